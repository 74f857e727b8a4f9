"""Read pieces of shards: straight from a local corpus, through a node-local copy of a remote one."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iqpir.errors import UsageError, VerificationError
from iqpir.training.checkpoint import file_sha256
from pipeline.corpus import Corpus
from pipeline.layout import ObjectRef

_OPEN_SHARDS = 64


class ShardCache:
    """Bytes of shard members by offset.

    A remote shard is fetched whole, once a node (a lock file keeps processes apart), compared with the
    manifest's size and sha256, and only then read; copies that were used least recently make room.

    Args:
        corpus: the sealed corpus.
        folder: where copies of remote shards go; a folder of this user below the system's temporary one by default.
        gib: size of all copies below ``folder``, at most; 0: half of its disk. One shard is always kept.
    """

    def __init__(self, corpus: Corpus, folder: str = "", gib: float = 0.0) -> None:
        self.corpus, self.root, self.gib = corpus, folder, gib
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
        path = self.corpus.storage.local(shard)
        self.open_files[shard] = self._copy(shard) if path is None else os.open(path, os.O_RDONLY)
        if len(self.open_files) > _OPEN_SHARDS:
            os.close(self.open_files.popitem(last=False)[1])
        return self.open_files[shard]

    def _copy(self, shard: str) -> int:
        """A descriptor of the sound copy of a remote shard, fetched if it has to be."""
        root = Path(self.root) if self.root else _own_folder()
        target = root / hashlib.sha256(self.corpus.storage.url.encode()).hexdigest()[:12] / shard
        target.parent.mkdir(parents=True, exist_ok=True)
        expected = self.corpus.manifest().object(shard)
        with _locked(target, wait=True):
            if not _sound(target, expected):
                self._close_removed()
                self._make_room(root, expected.bytes)
                self._fetch(shard, target, expected)
            # When it was used is kept in the time of access, which no reading changes where a disk is mounted noatime.
            os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
            return os.open(target, os.O_RDONLY)

    def _fetch(self, shard: str, target: Path, expected: ObjectRef) -> None:
        partial = target.with_name(target.name + ".part")
        self.corpus.storage.download(shard, partial)
        if partial.stat().st_size != expected.bytes or file_sha256(partial) != expected.sha256:
            partial.unlink()
            raise VerificationError(
                f"{self.corpus.storage.uri(shard)} does not have the size and sha256 of the manifest.",
                "Run jobs/verify.py on the corpus.",
            )
        os.replace(partial, target)
        _stamp(target).write_text(_state(target, expected), encoding="ascii")

    def _make_room(self, root: Path, size: int) -> None:
        """Remove copies, the one that was not used for longest first, until ``size`` more bytes fit."""
        limit = self.gib * 2**30 if self.gib else shutil.disk_usage(root).total / 2
        copies = []
        for path in root.rglob("*.tar"):
            facts = path.stat()
            copies.append((facts.st_atime_ns, facts.st_size, path))
        held = sum(copy[1] for copy in copies)
        for _, freed, path in sorted(copies):
            if held + size <= limit:
                return
            with _locked(path, wait=False) as ours:
                if ours:  # else somebody is opening it
                    path.unlink(missing_ok=True)
                    _stamp(path).unlink(missing_ok=True)
                    held -= freed

    def _close_removed(self) -> None:
        """Close what others removed: it takes room until then."""
        for shard, descriptor in list(self.open_files.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self.open_files.pop(shard))


def _own_folder() -> Path:
    """A folder that only this user can write.

    Raises:
        UsageError: another user has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"iqpir-shards-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UsageError(f"{folder} is open to other users.", "Remove it, or set --feed.cache to a folder of your own.")
    return folder


@contextmanager
def _locked(target: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of one copy; False where another process has it and this one does not wait."""
    with open(f"{target}.lock", "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _sound(target: Path, expected: ObjectRef) -> bool:
    """Whether a copy is what the manifest says; hashed once a node, then its stamp says so."""
    if not target.exists() or target.stat().st_size != expected.bytes:
        return False
    stamp = _stamp(target)
    state = _state(target, expected)
    if stamp.exists() and stamp.read_text(encoding="ascii") == state:
        return True
    if file_sha256(target) != expected.sha256:
        return False
    stamp.write_text(state, encoding="ascii")
    return True


def _stamp(target: Path) -> Path:
    return target.with_name(target.name + ".sound")


def _state(target: Path, expected: ObjectRef) -> str:
    """What changes when the copy does."""
    facts = target.stat()
    return f"{expected.sha256} {facts.st_ino} {facts.st_mtime_ns}"
