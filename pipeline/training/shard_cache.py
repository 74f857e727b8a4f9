"""Read pieces of shards: straight from a local corpus, through a node-local copy of a remote one."""

import fcntl
import hashlib
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

from iqpir.errors import VerificationError
from pipeline.corpus import Corpus
from pipeline.layout import sha256_hex

_OPEN_SHARDS = 64


class ShardCache:
    """Bytes of shard members by offset.

    A remote shard is fetched whole, once a node (a lock file keeps processes apart), compared with the
    manifest's size and sha256, and only then read.

    Args:
        corpus: the sealed corpus.
        folder: where copies of remote shards go; a folder below the system's temporary one by default.
    """

    def __init__(self, corpus: Corpus, folder: str = "") -> None:
        self.corpus = corpus
        digest = hashlib.sha256(corpus.storage.url.encode()).hexdigest()[:12]
        self.folder = Path(folder or Path(tempfile.gettempdir()) / "iqpir-shards") / digest
        self.open_files: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """``size`` bytes of ``shard`` (a path within the corpus) from ``offset`` on.

        Raises:
            VerificationError: the shard ends earlier, or a fetched copy is not what the manifest says.
        """
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            raise VerificationError(
                f"{self.corpus.storage.uri(shard)} ends before byte {offset + size}.",
                "Run jobs/verify.py on the corpus.",
            )
        return data

    def _descriptor(self, shard: str) -> int:
        if shard in self.open_files:
            self.open_files.move_to_end(shard)
            return self.open_files[shard]
        path = self.corpus.storage.local(shard) or self._fetch(shard)
        self.open_files[shard] = os.open(path, os.O_RDONLY)
        if len(self.open_files) > _OPEN_SHARDS:
            os.close(self.open_files.popitem(last=False)[1])
        return self.open_files[shard]

    def _fetch(self, shard: str) -> Path:
        target = self.folder / shard
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{target}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                return target
            data = self.corpus.storage.read(shard)
            expected = self.corpus.manifest().object(shard)
            if sha256_hex(data) != expected.sha256:
                raise VerificationError(
                    f"{self.corpus.storage.uri(shard)} does not have the sha256 of the manifest.",
                    "Run jobs/verify.py on the corpus.",
                )
            partial = target.with_name(target.name + ".part")
            partial.write_bytes(data)
            os.replace(partial, target)
        return target
