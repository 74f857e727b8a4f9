"""Feed training from a node-local ``.beton``: the same samples in the same order as ``IndexedFeed``.

Only where the pixels come from differs: decoded and fitted once, when jobs/export.py wrote the file. With
``mode: raw`` and a fit other than ``crop`` every batch equals IndexedFeed's for the same seed and
``samples_seen``; with ``crop`` the file holds the central crop, where IndexedFeed moves it.
"""

import dataclasses
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from iqpir.errors import UsageError, VerificationError
from iqpir.stages.batch import Batch
from iqpir.training.checkpoint import file_sha256
from pipeline.exports.beton import BetonFacts, require_ffcv
from pipeline.exports.beton_reader import BetonReader
from pipeline.training.feed import IndexedFeed, Picture, Samples


class BetonSamples(Samples):
    """``Samples`` whose pictures come from a ``.beton``; opened anew in each process."""

    def __init__(self, beton: Path, samples: Samples) -> None:
        self.__dict__ |= samples.__dict__
        self.beton, self.cache = beton, None
        self.reader: BetonReader | None = None

    def hq(self, index: int) -> Picture:
        """The sample's picture as it was exported, uint8 RGB HWC."""
        if self.reader is None:
            self.reader = BetonReader(self.beton)
        return self.reader.picture(index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "reader": None}


@dataclass(frozen=True)
class FfcvFeed:
    """Batches of a view's training split from a ``.beton`` (a ``BatchSource``).

    Attributes:
        beton: the file; its sidecar must be beside it.
        view_digest: of the view in use.
        samples: the training samples of that view; their pictures are taken from ``beton``.
        batch_size: samples of one global batch; each rank takes ``batch_size / world_size``.

    Raises:
        UsageError: ffcv is missing; there is no finished ``.beton``, or it is of another view, split, size or
            pixel policy.
        VerificationError: the file is not what its sidecar says.
    """

    beton: Path
    view_digest: str
    samples: Samples
    batch_size: int
    rank: int
    world_size: int
    device: torch.device
    indexed: IndexedFeed = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_ffcv()
        facts = read_facts(self.beton)
        self._refuse_others(facts)
        _verify_once(self.beton, facts)
        quality = BetonReader(self.beton).quality.astype(np.float32)
        if not np.array_equal(quality, self.samples.quality):
            raise VerificationError(f"The qualities in {self.beton} differ from the view's.", _AGAIN)
        feed = IndexedFeed(
            BetonSamples(self.beton, self.samples), self.batch_size, self.rank, self.world_size, self.device
        )
        object.__setattr__(self, "indexed", feed)

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """This rank's part of each global batch, from sample number ``samples_seen`` on."""
        return self.indexed.batches(samples_seen)

    def _refuse_others(self, facts: BetonFacts) -> None:
        """Raise UsageError where the file was made for another training than this one."""
        config = self.samples.config
        wanted = {
            "view_digest": self.view_digest,
            "split": "train",
            "count": len(self.samples),
            "image_size": self.samples.size,
            "fit": config.fit,
            "pixels": config.pixels.digest(),
        }
        found = {name: value for name, value in dataclasses.asdict(facts).items() if name in wanted}
        different = [
            f"{name} {found[name]} in place of {wanted[name]}" for name in wanted if found[name] != wanted[name]
        ]
        if different:
            raise UsageError(f"{self.beton} (view {facts.view}) has {', '.join(different)}.", _AGAIN)


_AGAIN = "Export the view in use: jobs/export.py --format ffcv."


def read_facts(beton: Path) -> BetonFacts:
    """The sidecar beside a ``.beton``.

    Raises:
        UsageError: the file or its sidecar is absent.
        VerificationError: the sidecar cannot be read.
    """
    sidecar = beton.with_name(f"{beton.name}.json")
    for path in (beton, sidecar):
        if not path.is_file():
            raise UsageError(f"{path} does not exist.", _AGAIN)
    return BetonFacts.from_json(sidecar.read_bytes(), str(sidecar))


def _verify_once(beton: Path, facts: BetonFacts) -> None:
    """Compare size and sha256, once a node: a stamp remembers the size and time of the file that was hashed.

    Raises:
        VerificationError: they differ.
    """
    state = beton.stat()
    if state.st_size != facts.size:
        raise VerificationError(f"{beton} has {state.st_size} bytes in place of {facts.size}.", _AGAIN)
    folder = Path(tempfile.gettempdir()) / f"iqpir-beton-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to another user.", "Set TMPDIR to a folder of your own.")
    stamp = folder / hashlib.sha256(str(beton.resolve()).encode()).hexdigest()
    content = f"{facts.sha256} {state.st_ino} {state.st_mtime_ns}"
    with stamp.open("a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read() == content:
            return
        if file_sha256(beton) != facts.sha256:
            raise VerificationError(f"{beton} does not have the sha256 of its sidecar.", _AGAIN)
        file.truncate(0)
        file.write(content)
