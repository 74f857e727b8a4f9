"""From a decoded picture to the samples of a corpus: rules, then its bytes, a smaller copy, tiles or crops."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iqpir.pixels import encode_png
from pipeline.layout import sha256_hex
from pipeline.sharding.crops import CropPolicy, Window, choose_windows, cut
from pipeline.sharding.picture_rules import (
    RejectPolicy,
    ResizePolicy,
    TilePolicy,
    require_shape,
    require_structure,
    shrunk,
    tile_windows,
)
from pipeline.sources.inputs import InputError

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "GIF": "gif"}
"""Member suffix by format: the content decides, not the input's name."""

FACTS = (
    "format", "width", "height", "original_width", "original_height", "channels", "bit_depth",
    "exif_orientation", "icc_profile",
)  # fmt: skip
"""What of ``iqpir.pixels.Picture.facts`` has a column."""

_COMPRESSION = 6


@dataclass(frozen=True)
class Item:
    """A row, and the encoded sample it is about (None for an input without one)."""

    row: dict[str, Any]
    data: bytes | None


@dataclass(frozen=True)
class Sampling:
    """Makes the samples of one picture."""

    min_side: int
    crop: CropPolicy
    tile: TilePolicy
    resize: ResizePolicy
    reject: RejectPolicy

    @property
    def cuts(self) -> bool:
        """Whether a picture may give several samples."""
        return bool(self.crop.size or self.tile.size)

    @property
    def needs_pixels(self) -> bool:
        """Whether facts do not suffice."""
        return self.cuts or bool(self.resize.side or self.resize.max_side) or self.reject.needs_pixels

    def __call__(self, row: dict[str, Any], data: bytes, pixels: NDArray[np.uint8] | None) -> list[Item]:
        """The samples of a picture.

        Args:
            row: of the input, with ``FACTS``.
            data: its encoded bytes.
            pixels: ``uint8 [H, W, 3]``; there where ``needs_pixels``.

        Raises:
            InputError: a rule excludes it.
        """
        require_shape(row["width"], row["height"], self.min_side, self.reject)
        if pixels is None:
            return [_sample(row, row["key"], SUFFIXES[row["format"]], data)]
        if self.reject.needs_pixels:
            require_structure(pixels, self.reject)
        smaller = shrunk(pixels, self.resize)
        if smaller is not None:
            pixels = smaller
            row = {**row, "width": pixels.shape[1], "height": pixels.shape[0], "format": "PNG"}
        size = self.crop.size or self.tile.size
        windows = self._windows(row, pixels)
        if windows:
            return [_window(row, pixels, window, size) for window in windows]
        if smaller is None:
            return [_sample(row, row["key"], SUFFIXES[row["format"]], data)]
        return [_sample(row, row["key"], "png", encode_png(pixels, _COMPRESSION))]

    def _windows(self, row: dict[str, Any], pixels: NDArray[np.uint8]) -> list[Window]:
        """What is cut out; empty where the picture stays whole."""
        width, height = row["width"], row["height"]
        if not self.crop.size:
            return tile_windows(width, height, self.tile)
        if min(width, height) < self.crop.size:
            smallest = max(self.min_side, self.crop.size)
            raise InputError("too_small", f"{width} x {height} has a side below {smallest}.")
        windows = choose_windows(pixels, row["key"], self.crop)
        if not windows:
            raise InputError("flat", f"Every crop has a luma deviation below {self.crop.min_std}.")
        return windows


def input_key(collection: str, relpath: str) -> str:
    """32 hex digits: without dots, so that tools which split names at the first dot cannot merge samples."""
    return sha256_hex(f"{collection}/{relpath}".encode())[:32]


def _window(row: dict[str, Any], pixels: NDArray[np.uint8], window: Window, size: int) -> Item:
    part = cut(pixels, window, size)
    place = {"crop_x": window.x, "crop_y": window.y, "crop_size": size}
    shape = {"width": part.shape[1], "height": part.shape[0], "format": "PNG"}
    key = input_key(row["collection"], f"{row['relpath']}#{window.x},{window.y},{size}")
    return _sample({**row, **place, **shape}, key, "png", encode_png(np.ascontiguousarray(part), _COMPRESSION))


def _sample(row: dict[str, Any], key: str, suffix: str, data: bytes) -> Item:
    found = {"key": key, "member": f"{key}.{suffix}", "byte_size": len(data), "sha256": sha256_hex(data)}
    return Item({**row, **found, "status": "success"}, data)
