"""Score a picture in tiles: native resolution in bounded memory, and one number for each part that training sees."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from iqpir.errors import UsageError

Aggregate = Literal["mean", "p10", "min"]
Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class TilingPolicy:
    """How a picture is cut before metrics see it; part of every fingerprint where it cuts."""

    size: int = 0
    """Side of the square tiles in pixels; 0: pictures are scored whole."""
    overlap: int = 0
    """Pixels that neighbouring tiles share at least."""
    aggregate: Aggregate = "mean"
    """What becomes the score: mean, p10 (the 10th percentile from the worse end), min (the worst tile)."""

    def __post_init__(self) -> None:
        if self.size < 0 or self.overlap < 0 or (self.size and self.overlap >= self.size):
            raise UsageError(
                f"tiling size {self.size} and overlap {self.overlap} do not fit.",
                "Neither may be negative, and the overlap is smaller than the size.",
            )

    def facts(self) -> dict[str, Any]:
        """JSON values for a fingerprint; nothing where pictures are whole."""
        return {"tiling": asdict(self)} if self.size else {}


@dataclass(frozen=True)
class TileScores:
    """Scores of a picture's tiles: their number, mean, 10th percentile and worst, on the metric's own scale."""

    tiles: int
    mean: float
    p10: float
    min: float

    def chosen(self, aggregate: Aggregate) -> float:
        """The one that becomes the score."""
        return {"mean": self.mean, "p10": self.p10, "min": self.min}[aggregate]


def cut(picture: Picture, policy: TilingPolicy) -> list[Picture]:
    """Tiles of equal size that cover ``picture`` [H, W, 3], row by row, as views.

    A side shorter than ``size`` stays whole; the last tile of a row ends at the edge and overlaps more.
    """
    height, width = picture.shape[:2]
    tall, wide = min(policy.size, height), min(policy.size, width)
    return [
        picture[y : y + tall, x : x + wide]
        for y in _starts(height, tall, policy.size - policy.overlap)
        for x in _starts(width, wide, policy.size - policy.overlap)
    ]


def combine(values: Sequence[float], direction: Literal["higher", "lower"]) -> TileScores:
    """Statistics of the scores of a picture's tiles (one or more), each rounded to float32 as it is stored."""
    scores = np.asarray(values, np.float64)
    worst = scores.min() if direction == "higher" else scores.max()
    p10 = np.quantile(scores, 0.1 if direction == "higher" else 0.9)
    return TileScores(len(scores), *(float(np.float32(value)) for value in (scores.mean(), p10, worst)))


def _starts(length: int, tile: int, stride: int) -> list[int]:
    """Offsets of tiles along one side: evenly strided, the last one at the end."""
    return [*range(0, length - tile, stride), length - tile]
