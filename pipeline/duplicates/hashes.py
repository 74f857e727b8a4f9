"""What near-duplicates are known by: digests of bytes and pixels, a perceptual hash, a tiny thumbnail."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from iqpir.config import digest
from iqpir.errors import IncompleteError, VerificationError
from iqpir.pixels import PictureError, PixelPolicy, decode
from pipeline.commits.manifest import ManifestUnit
from pipeline.commits.records import finished
from pipeline.commits.units import SchedulingConfig, run_units
from pipeline.corpus import Corpus
from pipeline.documents import in_threads
from pipeline.layout import HASHES, hashes_path, sha256_hex
from pipeline.scoring.passes import read_samples
from pipeline.scoring.tables import read_table
from pipeline.storage import Storage

STEP = "hash"
FORMAT = 1
"""Raised when a picture may get other hashes; part of the fingerprint."""
THUMBNAIL_SIDE = 8
THUMBNAIL_BYTES = THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3
_READ_UNITS = 64


@dataclass(frozen=True)
class Hashed:
    """Hashes of one picture.

    Attributes:
        pixel_digest: 32 hex digits of the sha256 over size and pixels.
        phash: 8 bytes, ``imagehash.phash`` (signs of the 8x8 lowest frequencies of a 32x32 DCT).
        contrast: standard deviation of the 32x32 grey picture, 0 to 127.5; a flat picture's phash is noise.
        thumbnail: 192 bytes, the picture as 8x8 RGB means: two pictures with equal phash may differ in it.
    """

    pixel_digest: str
    phash: bytes
    contrast: float
    thumbnail: bytes


def hash_picture(picture: NDArray[np.uint8]) -> Hashed:
    """Hashes of a picture: uint8 RGB [H, W, 3]."""
    image = Image.fromarray(picture)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS))
    small = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    pixels = f"{picture.shape[0]}x{picture.shape[1]}".encode() + np.ascontiguousarray(picture).tobytes()
    return Hashed(
        pixel_digest=sha256_hex(pixels)[:32],
        phash=np.packbits(imagehash.phash(image).hash.reshape(-1)).tobytes(),
        contrast=float(grey.std()),
        thumbnail=np.asarray(small).tobytes(),
    )


def hashes_fingerprint(policy: PixelPolicy) -> str:
    """What decides a hash: the pixel policy, the library and its version."""
    return digest({"format": FORMAT, "pixels": policy.digest(), "imagehash": metadata.version("imagehash")})


def hash_corpus(corpus: Corpus, policy: PixelPolicy, scheduling: SchedulingConfig) -> str:
    """Hash every unit that has no hashes yet; returns the fingerprint they lie under.

    Raises:
        IncompleteError: units are left; the same command goes on.
        VerificationError: bytes are not those that were committed.
    """
    fingerprint, units = hashes_fingerprint(policy), corpus.manifest().units
    work = _Hashing(corpus.storage, policy, fingerprint)
    report = run_units(corpus.storage, STEP, fingerprint, units, work, total=len(units), scheduling=scheduling)
    report.require_complete(STEP)
    return fingerprint


@dataclass(frozen=True)
class _Hashing:
    """Hashes the samples of a unit; picklable."""

    storage: Storage
    policy: PixelPolicy
    fingerprint: str

    def __call__(self, unit: ManifestUnit) -> dict[str, Any]:
        """Store the unit's table and return its commit record."""
        corpus = Corpus(self.storage)
        rows = corpus.unit_samples(unit, ["key", "shard", "byte_offset", "byte_size", "sha256"]).to_pylist()
        found: dict[str, dict[str, Any]] = {}
        for row, data in read_samples(corpus, rows):
            found[row["key"]] = {"key": row["key"], "sample_sha256": row["sha256"], **self._hashes(data)}
        table = pa.Table.from_pylist([found[row["key"]] for row in rows], HASHES)
        reference = corpus.publish_table(
            table,
            lambda sha256: hashes_path(self.fingerprint, unit.ordinal, sha256),
            {"fingerprint": self.fingerprint, "pixels": self.policy.digest()},
        )
        failed = sum(row["status"] != "success" for row in found.values())
        return {"objects": [reference.to_dict()], "samples": len(rows), "failed": failed}

    def _hashes(self, data: bytes) -> dict[str, Any]:
        try:
            return {"status": "success", "error_code": None, **vars(hash_picture(decode(data, self.policy).array))}
        except PictureError as error:
            return {"status": "failed_decode", "error_code": error.code}


def read_hashes(corpus: Corpus, fingerprint: str) -> Iterator[tuple[ManifestUnit, pa.Table]]:
    """Units and the hashes of their live samples (``HASHES``), few units in memory at a time.

    Raises:
        IncompleteError: a unit has none.
        VerificationError: a table is damaged or lacks a sample.
    """
    units = corpus.manifest().units
    done = finished(corpus.storage, STEP, fingerprint)
    left = sum(unit.unit_id not in done for unit in units)
    if left:
        raise IncompleteError(f"{left} of {len(units)} units have no hashes.", "Run jobs/dedup.py again.")

    def read(unit: ManifestUnit) -> pa.Table:
        keys = corpus.unit_samples(unit, ["key"])["key"]
        table = read_table(corpus, done[unit.unit_id]["objects"][0])
        position = pc.index_in(keys, value_set=table["key"].combine_chunks())
        if position.null_count:
            raise VerificationError(f"{position.null_count} samples of unit {unit.ordinal:06d} have no hashes.")
        return table.take(position)

    for start in range(0, len(units), _READ_UNITS):
        some = units[start : start + _READ_UNITS]
        yield from zip(some, in_threads(read, some), strict=True)
