"""Which pictures are kept out, and how large ones are made smaller; no rule is on unless it is asked for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iqpir.errors import UsageError
from pipeline.sharding.crops import LUMA, Window
from pipeline.sources.inputs import InputError


@dataclass(frozen=True, kw_only=True)
class RejectPolicy:
    """Which pictures are rejected besides those that are too small."""

    max_aspect: float = 0.0
    """Longest allowed long side over short side, such as 4; 0: any."""
    max_flat: float = 1.0
    """Largest allowed share (0 to 1) of flat blocks; 1: any."""
    flat_block: int = 16
    """Side of a block in pixels; what is left at the right and lower edge counts not."""
    flat_std: float = 2.0
    """A block is flat if its luma has a smaller standard deviation (0 to 127.5)."""

    def __post_init__(self) -> None:
        if self.max_aspect != 0 and self.max_aspect < 1:
            raise UsageError(f"reject max_aspect {self.max_aspect} is below 1.", "Give long side over short side.")
        if not 0 <= self.max_flat <= 1 or self.flat_block < 2 or not 0 <= self.flat_std <= 127.5:
            raise UsageError(
                f"reject max_flat {self.max_flat} (0 to 1), flat_block {self.flat_block} (2 or more), "
                f"flat_std {self.flat_std} (0 to 127.5): one is out of its range."
            )

    @property
    def needs_pixels(self) -> bool:
        """Whether sizes alone do not decide."""
        return self.max_flat < 1


@dataclass(frozen=True, kw_only=True)
class ResizePolicy:
    """To which size pictures are shrunk; pictures that are as small already keep their bytes."""

    max_side: int = 0
    """Longer side of larger pictures afterwards, in pixels; 0: as it is."""
    side: int = 0
    """Shorter side of larger pictures afterwards, in pixels; 0: as it is."""

    def __post_init__(self) -> None:
        if min(self.max_side, self.side) < 0:
            raise UsageError(f"resize max_side {self.max_side} and side {self.side} cannot be negative.")
        if self.max_side and self.side:
            raise UsageError("resize max_side and side contradict each other.", "Give one of them.")


@dataclass(frozen=True, kw_only=True)
class TilePolicy:
    """How large pictures are cut into tiles that cover them; smaller ones keep their bytes."""

    size: int = 0
    """Side of the tiles in pixels; 0 keeps whole pictures. Where a picture is thinner, its tiles are too."""
    overlap: int = 0
    """Pixels that neighbouring tiles share at least; the last tile of a row or column ends at the edge."""

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.overlap < max(self.size, 1):
            raise UsageError(
                f"tile overlap {self.overlap} does not fit tiles of {self.size} pixels.",
                "The overlap is at least 0 and smaller than --tile.size.",
            )


def require_shape(width: int, height: int, min_side: int, policy: RejectPolicy) -> None:
    """Raise ``InputError`` where a picture is too small or too elongated."""
    if min(width, height) < min_side:
        raise InputError("too_small", f"{width} x {height} has a side below {min_side}.")
    if policy.max_aspect and max(width, height) > policy.max_aspect * min(width, height):
        raise InputError("aspect_ratio", f"{width} x {height} is longer than {policy.max_aspect:g} to 1.")


def require_structure(picture: NDArray[np.uint8], policy: RejectPolicy) -> None:
    """Raise ``InputError`` where too many blocks of a picture are flat."""
    share = flat_share(picture, policy.flat_block, policy.flat_std)
    if share > policy.max_flat:
        raise InputError("flat_regions", f"{share:.3f} of its blocks are flat, more than {policy.max_flat:g}.")


def flat_share(picture: NDArray[np.uint8], block: int, std: float) -> float:
    """Share of ``block`` x ``block`` tiles whose luma deviates less than ``std``; 0 without a whole block.

    Args:
        picture: ``uint8 [H, W, 3]``.
        block: side in pixels.
        std: 0 to 127.5.
    """
    rows, columns = picture.shape[0] // block, picture.shape[1] // block
    if not rows or not columns:
        return 0.0
    luma = picture[: rows * block, : columns * block].astype(np.float32) @ LUMA
    deviations = luma.reshape(rows, block, columns, block).std(axis=(1, 3))
    return float((deviations < std).mean())


def shrunk(picture: NDArray[np.uint8], policy: ResizePolicy) -> NDArray[np.uint8] | None:
    """The picture at the size that the policy asks for, or None if it is as small already.

    Args:
        picture: ``uint8 [H, W, 3]``; resampled by Lanczos's window over the 8-bit values.
        policy: with one size or none.
    """
    height, width = picture.shape[:2]
    wanted, now = (policy.side, min(width, height)) if policy.side else (policy.max_side, max(width, height))
    if not wanted or now <= wanted:
        return None
    size = tuple(max(1, round(side * wanted / now)) for side in (width, height))
    return np.asarray(Image.fromarray(picture).resize((size[0], size[1]), Image.Resampling.LANCZOS))


def tile_windows(width: int, height: int, policy: TilePolicy) -> list[Window]:
    """Corners of the tiles, from top to bottom, left to right; empty where one tile has the whole picture."""
    if not policy.size or max(width, height) <= policy.size:
        return []
    return [Window(x, y) for y in _starts(height, policy) for x in _starts(width, policy)]


def _starts(length: int, policy: TilePolicy) -> list[int]:
    last = max(0, length - policy.size)
    return [*range(0, last, policy.size - policy.overlap), last]
