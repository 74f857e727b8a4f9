"""Load the hashes of a corpus and join its samples to clusters; memory grows with samples by a hundred bytes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iqpir.errors import UsageError
from pipeline.corpus import Corpus
from pipeline.duplicates.clusters import HASH_BITS, Forest, Rows, join_equal, near_pairs
from pipeline.duplicates.hashes import THUMBNAIL_BYTES, read_hashes

Keys = NDArray[np.bytes_]


@dataclass(frozen=True, kw_only=True)
class LikenessPolicy:
    """What counts as a duplicate."""

    perceptual: bool = True
    """Also join pictures that look alike; else only equal bytes and equal pixels."""
    distance: int = 6
    """Most bits of 64 in which the perceptual hashes of two copies differ."""
    thumbnail_difference: float = 6.0
    """Most mean difference of their 8x8 thumbnails, in levels of 255: hashes alone confuse plain pictures."""
    min_contrast: float = 2.0
    """Pictures with less contrast (standard deviation of grey, in levels) have no usable hash."""

    def __post_init__(self) -> None:
        if not 0 <= self.distance < HASH_BITS // 2:
            raise UsageError(f"distance {self.distance} is outside 0 to {HASH_BITS // 2 - 1}.", "Copies have 0 to 6.")
        if self.thumbnail_difference < 0 or self.min_contrast < 0:
            raise UsageError(
                f"thumbnail_difference {self.thumbnail_difference} and min_contrast {self.min_contrast}: "
                "none may be negative."
            )


@dataclass(frozen=True)
class HashedSamples:
    """Hashes of all samples, ordered by key; ``thumbnails`` lie in a file, at ``place``."""

    keys: Keys
    bytes: Keys
    pixels: Keys
    phash: NDArray[np.uint64]
    contrast: NDArray[np.float32]
    place: Rows
    thumbnails: NDArray[np.uint8]


@contextmanager
def loaded_hashes(corpus: Corpus, fingerprint: str) -> Iterator[HashedSamples]:
    """Hashes of every live sample; thumbnails go to a scratch file: they are wanted for few samples."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("key", "bytes", "pixels", "phash", "contrast")}
    with tempfile.TemporaryDirectory(prefix="iqpir-dedup-") as folder:
        scratch = Path(folder) / "thumbnails"
        with scratch.open("wb") as file:
            for _, table in read_hashes(corpus, fingerprint):
                parts["key"].append(np.array(table["key"].to_pylist(), "S32"))
                parts["bytes"].append(np.array(table["sample_sha256"].to_pylist(), "S32"))
                parts["pixels"].append(np.array([text or "" for text in table["pixel_digest"].to_pylist()], "S32"))
                phash = b"".join(value or bytes(8) for value in table["phash"].to_pylist())
                parts["phash"].append(np.frombuffer(phash, np.uint64))
                parts["contrast"].append(table["contrast"].to_numpy(zero_copy_only=False).astype(np.float32))
                file.writelines(value or bytes(THUMBNAIL_BYTES) for value in table["thumbnail"].to_pylist())
        columns = {name: np.concatenate(found) for name, found in parts.items()}
        order = np.argsort(columns["key"]).astype(np.int64)
        shape = (len(order), THUMBNAIL_BYTES)
        thumbnails = np.memmap(scratch, np.uint8, "r", shape=shape) if len(order) else np.zeros(shape, np.uint8)
        yield HashedSamples(
            keys=columns["key"][order],
            bytes=columns["bytes"][order],
            pixels=columns["pixels"][order],
            phash=columns["phash"][order],
            contrast=columns["contrast"][order],
            place=order,
            thumbnails=thumbnails,
        )


def join_samples(samples: HashedSamples, config: LikenessPolicy) -> tuple[Rows, Rows, Rows]:
    """Root of each row (the row of its cluster's smallest key), and first row with its bytes, its pixels."""
    forest = Forest(len(samples.keys))
    equal_bytes = join_equal(forest, samples.bytes)
    equal_pixels = join_equal(forest, samples.pixels)
    if config.perceptual:
        # Of equal pixels one is enough: thousands of exact copies do not make millions of pairs.
        first = equal_pixels == np.arange(len(samples.keys))
        usable = np.nan_to_num(samples.contrast, nan=-1.0) >= config.min_contrast
        rows = np.flatnonzero(first & usable & (samples.pixels != b"")).astype(np.int64)
        for a, b in near_pairs(samples.phash[rows], config.distance):
            apart = ~forest.together(rows[a], rows[b])
            a, b = rows[a[apart]], rows[b[apart]]
            alike = _thumbnails_differ(samples, a, b) <= config.thumbnail_difference
            forest.join(a[alike], b[alike])
    return forest.roots(), equal_bytes, equal_pixels


def _thumbnails_differ(samples: HashedSamples, first: Rows, second: Rows) -> NDArray[np.float64]:
    """Mean absolute difference of thumbnails, in levels."""
    found = np.empty(len(first), np.float64)
    for start in range(0, len(first), 1 << 14):
        part = slice(start, start + (1 << 14))
        a = samples.thumbnails[samples.place[first[part]]].astype(np.int16)
        b = samples.thumbnails[samples.place[second[part]]].astype(np.int16)
        found[part] = np.abs(a - b).mean(axis=1)
    return found
