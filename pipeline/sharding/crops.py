"""Which windows of a picture become samples: a grid, thinned by hash, without flat ones. No randomness."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iqpir.errors import UsageError

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """How pictures are cut into samples; without a size they are kept whole, byte for byte."""

    size: int = 0
    """Side of the square crops in pixels; 0 keeps whole pictures, as their original bytes."""
    stride: int = 0
    """Distance of neighbouring crops in pixels; 0: the size (no overlap)."""
    per_picture: int = 0
    """At most this many crops of one picture, chosen by hash; 0: all."""
    min_std: float = 0.0
    """Crops whose luma has a smaller standard deviation (0 to 127.5) are left out as flat."""

    def __post_init__(self) -> None:
        if min(self.size, self.stride, self.per_picture) < 0:
            raise UsageError(
                f"crop size {self.size}, stride {self.stride} and per_picture {self.per_picture} cannot be negative."
            )
        if not self.size and (self.stride or self.per_picture or self.min_std):
            raise UsageError("A crop policy without a size does nothing.", "Give --crop.size.")
        if not 0.0 <= self.min_std <= 127.5:
            raise UsageError(f"crop min_std {self.min_std} is outside [0, 127.5].")


class Window(NamedTuple):
    """Upper left corner of a crop, in pixels."""

    x: int
    y: int


def choose_windows(picture: NDArray[np.uint8], identity: str, policy: CropPolicy) -> list[Window]:
    """The crops of one picture.

    Args:
        picture: ``uint8 [H, W, 3]``.
        identity: what the choice is hashed from besides the position, such as the input's key.
        policy: with a positive size.

    Returns:
        Windows from top to bottom, left to right; empty if the picture is smaller than a crop, or flat.
    """
    height, width = picture.shape[:2]
    stride = policy.stride or policy.size
    windows = [
        Window(x, y)
        for y in range(0, height - policy.size + 1, stride)
        for x in range(0, width - policy.size + 1, stride)
    ]
    limit = policy.per_picture or len(windows)
    if limit < len(windows):
        windows.sort(key=lambda window: _rank(identity, window))
    chosen: list[Window] = []
    for window in windows:
        if len(chosen) == limit:
            break
        if policy.min_std == 0.0 or _std(cut(picture, window, policy.size)) >= policy.min_std:
            chosen.append(window)
    return sorted(chosen, key=lambda window: (window.y, window.x))


def cut(picture: NDArray[np.uint8], window: Window, size: int) -> NDArray[np.uint8]:
    """``uint8 [size, size, 3]`` at ``window``; a view."""
    return picture[window.y : window.y + size, window.x : window.x + size]


def _rank(identity: str, window: Window) -> bytes:
    return hashlib.sha256(f"{identity}#{window.x},{window.y}".encode()).digest()


def _std(crop: NDArray[np.uint8]) -> float:
    return float((crop.astype(np.float32) @ LUMA).std())
