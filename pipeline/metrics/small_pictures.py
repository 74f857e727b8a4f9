"""What happens to pictures that are smaller than a metric can judge: a declared enlargement."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Enlargement = Literal["mirror", "bicubic"]
"""``mirror`` repeats the picture in reflection: its pixels stay what they are; ``bicubic`` scales it up."""


class Enlarged(nn.Module):
    """A scorer behind the enlargement of pictures whose shorter side is below ``min_side``."""

    def __init__(self, scorer: Callable[[Tensor], Tensor], min_side: int, manner: Enlargement) -> None:
        """Args: scorer: [B,3,H,W] -> [B] or [B,1]. min_side: in pixels. manner: see ``Enlargement``."""
        super().__init__()
        self.scorer = scorer
        self.min_side = min_side
        self.manner = manner

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B,3,H,W] in [0,1] -> scores [B], float32."""
        scores: Tensor = self.scorer(enlarge(pictures, self.min_side, self.manner))
        return scores.reshape(len(pictures)).float()


def enlarge(pictures: Tensor, min_side: int, manner: Enlargement) -> Tensor:
    """``pictures`` [B,3,H,W] with both sides at least ``min_side``; untouched where they are already."""
    height, width = pictures.shape[-2:]
    if min(height, width) >= min_side:
        return pictures
    if manner == "mirror":
        rows = _reflected(height, max(height, min_side)).to(pictures.device)
        columns = _reflected(width, max(width, min_side)).to(pictures.device)
        return pictures[..., rows, :][..., columns]
    ratio = min_side / min(height, width)
    size = (max(min_side, round(height * ratio)), max(min_side, round(width * ratio)))
    return functional.interpolate(pictures, size, mode="bicubic", align_corners=False).clamp(0.0, 1.0)


def _reflected(length: int, wanted: int) -> Tensor:
    """Indices 0..length-1, back again, and so on: the edge pixel is repeated, no row is favoured."""
    index = torch.arange(wanted) % (2 * length)
    return torch.where(index < length, index, 2 * length - 1 - index)
