"""Paired data: degraded pictures that exist, in place of degradations that are made.

The degraded pictures are a corpus of their own, of whole pictures; one belongs to a good picture where their
relative paths agree but for the suffix. A good sample that is a crop gets the same crop of its partner. All
pairs are found and compared in size before anything starts; a digest of them is part of a run's lineage.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from iqpir.config import digest
from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import PixelPolicy, decode
from pipeline.corpus import Corpus
from pipeline.training.shard_cache import ShardCache

Picture = NDArray[np.uint8]
READ = "docs/method.md"
_PLACE = ("relpath", "sha256", "shard", "byte_offset", "byte_size")
_SIZE = ("width", "height", "original_width", "original_height", "exif_orientation")
_CROP = ("crop_x", "crop_y", "crop_size")
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Where degraded pictures are taken from instead of being made."""

    lq: str = ""
    """Folder or URL of the corpus of degraded pictures, sharded whole; empty: they are made from the good ones."""
    scale: int = 1
    """How many times larger the sides of the good pictures are; smaller ones are enlarged (bicubic)."""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise UsageError(f"pairs.scale {self.scale} is below 1.", "Give how many times larger the good ones are.")
        if self.scale > 1 and not self.lq:
            raise UsageError(f"pairs.scale is {self.scale} and pairs.lq is empty.", "Name the corpus with --pairs.lq.")


class Pairs:
    """The degraded partners of the samples of a view's split, by number. Picklable; made by ``find_pairs``."""

    def __init__(
        self, url: str, scale: int, rows: list[dict[str, Any]], pixels: PixelPolicy, cache: str = "", gib: float = 0.0
    ) -> None:
        self.url, self.scale, self.rows, self.pixels, self.folder, self.gib = url, scale, rows, pixels, cache, gib
        self._cache: ShardCache | None = None

    @property
    def digest(self) -> str:
        """Changes with any degraded picture, its place or the scale: 32 hex digits."""
        return digest([self.scale, [[row[name] for name in ("key", "sha256", *_CROP)] for row in self.rows]], 32)

    def lq(self, index: int) -> Picture:
        """The partner of sample ``index``: uint8 RGB HWC of the sample's own size.

        Raises:
            VerificationError: it has another size than its row says.
        """
        row = self.rows[index]
        if self._cache is None:
            self._cache = ShardCache(Corpus(self.url), self.folder, self.gib)
        data = self._cache.read(row["shard"], row["byte_offset"], row["byte_size"])
        picture = decode(data, self.pixels).array
        if picture.shape[:2] != (row["height"], row["width"]):
            raise VerificationError(
                f"{row['relpath']} of {self.url} is {picture.shape[1]}x{picture.shape[0]}, its row says "
                f"{row['width']}x{row['height']}.",
                "Decode it as it was sharded, or run jobs/verify.py on that corpus.",
            )
        if self.scale > 1:
            size = (row["width"] * self.scale, row["height"] * self.scale)
            picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
        if row["crop_size"] is None:
            return picture
        x, y, side = (row[name] for name in _CROP)
        return np.ascontiguousarray(picture[y : y + side, x : x + side])

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": None}


def find_pairs(
    config: PairsConfig, corpus: Corpus, keys: list[str], pixels: PixelPolicy, cache: str = "", gib: float = 0.0
) -> Pairs:
    """The degraded partner of each good sample.

    Args:
        config: names the corpus of degraded pictures.
        corpus: of the good pictures.
        keys: of samples of ``corpus``; their order is that of the pairs.
        pixels: how bytes become pixels.
        cache: folder for shards of a remote corpus.
        gib: their size at most; see ``ShardCache``.

    Raises:
        UsageError: no such corpus, a good picture without its partner, or sides that are not in the scale.
    """
    partners = _by_stem(config.lq, Corpus(config.lq).samples([*_PLACE, *_SIZE, *_CROP]).to_pylist())
    known = {row["key"]: row for row in corpus.samples(["key", "relpath", *_SIZE, *_CROP]).to_pylist()}
    good = [known[key] for key in keys]
    missing = sorted({row["relpath"] for row in good if _stem(row) not in partners})
    if missing:
        raise UsageError(
            f"{len(missing)} good pictures have no degraded one in {config.lq}, such as {_named(missing)}.",
            "Shard degraded pictures with the same relative paths (suffixes may differ), or curate without these.",
            READ,
        )
    found = [_pair(row, partners[_stem(row)], config) for row in good]
    return Pairs(config.lq, config.scale, found, pixels, cache, gib)


def _by_stem(url: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    cut = [row["relpath"] for row in rows if row["crop_size"] is not None]
    if cut:
        raise UsageError(
            f"The corpus {url} holds crops, such as of {cut[0]}.", "Shard degraded pictures without --crop.size.", READ
        )
    twice = sorted(stem for stem, count in Counter(map(_stem, rows)).items() if count > 1)
    if twice:
        raise UsageError(f"The corpus {url} has several pictures {_named(twice)}.", "Keep one of each.", READ)
    return {_stem(row): row for row in rows}


def _pair(good: dict[str, Any], degraded: dict[str, Any], config: PairsConfig) -> dict[str, Any]:
    """The row of a partner, with the crop of the good sample."""
    whole, small = _whole_size(good), (degraded["width"], degraded["height"])
    if whole != (small[0] * config.scale, small[1] * config.scale):
        factor = whole[0] // max(1, small[0])
        fits = factor > 0 and whole == (small[0] * factor, small[1] * factor)
        raise UsageError(
            f"{good['relpath']} is {whole[0]}x{whole[1]}, its degraded partner {small[0]}x{small[1]}: not the "
            f"pairs.scale {config.scale}.",
            f"Set --pairs.scale {factor}." if fits else "Sides must differ by one whole factor, the same for all.",
            READ,
        )
    place = {name: degraded[name] for name in (*_PLACE, "width", "height")}
    return {"key": good["key"], **place, **{name: good[name] for name in _CROP}}


def _whole_size(row: dict[str, Any]) -> tuple[int, int]:
    """Width and height of the picture that a sample is, or is cut from, upright."""
    if row["crop_size"] is None:
        return row["width"], row["height"]
    sides = (row["original_width"], row["original_height"])
    # Orientations 5 to 8 lie on their side.
    return (sides[1], sides[0]) if (row["exif_orientation"] or 1) >= 5 else sides


def _stem(row: dict[str, Any]) -> str:
    return str(PurePosixPath(row["relpath"]).with_suffix(""))


def _named(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN])
