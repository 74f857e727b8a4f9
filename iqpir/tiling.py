"""Pictures of any size as overlapping square tiles, and back without seams.

Neighbouring tiles fade into each other with raised-cosine weights that are normalised to a sum of 1, so that
tiles that agree are blended exactly. A picture smaller than a tile is mirrored at its borders.
"""

import math

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side: the fewest that cover it, evenly spread, overlapping by ``overlap``.

    Args:
        length: pixels of the side.
        tile: pixels of a tile.
        overlap: pixels that neighbours share at least, below ``tile``.
    """
    if length <= tile:
        return [0]
    gaps = math.ceil((length - tile) / (tile - overlap))
    return [round(number * (length - tile) / gaps) for number in range(gaps + 1)]


def fading_window(tile: int, overlap: int) -> Tensor:
    """Weights [tile, tile] in (0, 1]: 1 inside, a raised cosine over ``overlap`` pixels at each border."""
    profile = torch.ones(tile, dtype=torch.float64)
    steps = (torch.arange(overlap, dtype=torch.float64) + 0.5) / max(1, overlap)
    fade = 0.5 - 0.5 * torch.cos(math.pi * steps)
    # Where the overlap is over half a tile both borders fade at once.
    profile[:overlap] *= fade
    profile[tile - overlap :] *= fade.flip(0)
    return torch.outer(profile, profile).float()


class Canvas:
    """One picture on its way through a network that takes square tiles.

    Args:
        picture: float [3, H, W].
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share at least.
    """

    def __init__(self, picture: Tensor, tile: int, overlap: int) -> None:
        self.tile, self.overlap = tile, overlap
        self.height, self.width = picture.shape[-2:]
        self._padded, self._top, self._left = _padded(picture, tile)
        height, width = self._padded.shape[-2:]
        self.corners = [
            (top, left) for top in tile_starts(height, tile, overlap) for left in tile_starts(width, tile, overlap)
        ]
        self._missing = len(self.corners)
        self._sum: Tensor | None = None
        self._weight = torch.zeros(height, width) if self._missing > 1 else None
        self._window = fading_window(tile, overlap) if self._missing > 1 else None

    def cut(self, number: int) -> Tensor:
        """Tile ``number`` of the picture, [3, tile, tile]."""
        top, left = self.corners[number]
        return self._padded[:, top : top + self.tile, left : left + self.tile]

    def paste(self, number: int, tile: Tensor) -> None:
        """Take the network's answer for tile ``number``, [3, tile, tile]; each tile once."""
        self._missing -= 1
        if self._weight is None or self._window is None:
            self._sum = tile
            return
        if self._sum is None:
            self._sum = torch.zeros_like(self._padded)
        top, left = self.corners[number]
        there = (slice(top, top + self.tile), slice(left, left + self.tile))
        self._sum[:, *there] += tile * self._window
        self._weight[there] += self._window

    @property
    def complete(self) -> bool:
        """Whether every tile was pasted."""
        return self._missing == 0

    def result(self) -> Tensor:
        """The blended picture, float [3, H, W] of the original size."""
        if not self.complete or self._sum is None:
            raise ValueError(f"{self._missing} tiles were not pasted.")
        blended = self._sum if self._weight is None else self._sum / self._weight
        return blended[:, self._top : self._top + self.height, self._left : self._left + self.width]


def _padded(picture: Tensor, tile: int) -> tuple[Tensor, int, int]:
    """The picture mirrored until both sides reach ``tile``, and how many rows and columns precede it."""
    height, width = picture.shape[-2:]
    top, left = max(0, tile - height) // 2, max(0, tile - width) // 2
    if height < tile:
        picture = picture.index_select(1, _mirrored(height, tile, top))
    if width < tile:
        picture = picture.index_select(2, _mirrored(width, tile, left))
    return picture, top, left


def _mirrored(length: int, wanted: int, before: int) -> Tensor:
    """Indices [wanted] into ``length`` pixels, mirrored at both ends as often as needed; no end twice."""
    period = max(1, 2 * (length - 1))
    folded = (torch.arange(wanted) - before).remainder(period)
    return torch.minimum(folded, period - folded).clamp_(max=length - 1)
