"""Score pictures of one size with one metric: in batches or tiles, surviving a bad one and full memory."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.commits.units import LostWorkerError
from pipeline.metrics import Metric, Scorer
from pipeline.scoring.tiling import Picture, TileScores, TilingPolicy, combine, cut

OUT_OF_MEMORY = "failed_out_of_memory"
FAILED_METRIC = "failed_metric"
RESCUE_SIDE = 224
"""A picture that does not fit into memory is not cut into smaller tiles than this."""

_OUT_OF_MEMORY_WORDS = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
"""ALLOC_FAILED: CUDNN_STATUS_ALLOC_FAILED, CUBLAS_STATUS_ALLOC_FAILED and their kin."""
_PICTURE_ERRORS = (RuntimeError, ValueError, ArithmeticError, AssertionError, IndexError)


@dataclass(frozen=True)
class Scored:
    """Score of one sample by one metric; ``raw`` is None unless ``status`` begins with ``success``."""

    raw: float | None
    status: str = "success"
    error_code: str = ""
    seconds: float = 0.0
    tiles: TileScores | None = None


@dataclass(frozen=True)
class LoadedMetric:
    """A metric and its scorer on a device."""

    metric: Metric
    scorer: Scorer
    device: str
    weights_sha256: str = ""
    """Digest of the scorer's tensors when it was loaded; "" without any."""


def score_pictures(
    loaded: LoadedMetric, pictures: Sequence[Picture], tiling: TilingPolicy, batch_pixels: int
) -> list[Scored]:
    """Scores of pictures of one size, whole (``pictures`` is the batch) or in tiles as declared."""
    if not tiling.size:
        return score_batch(loaded, pictures)
    return score_tiles(loaded, pictures, tiling, batch_pixels)


def score_tiles(
    loaded: LoadedMetric, pictures: Sequence[Picture], tiling: TilingPolicy, batch_pixels: int
) -> list[Scored]:
    """Scores of pictures of one size in tiles; a tile that fails fails its sample only."""
    cuts = [cut(picture, tiling) for picture in pictures]
    tiles = [tile for group in cuts for tile in group]
    pixels = tiles[0].shape[0] * tiles[0].shape[1]
    width = max(1, batch_pixels // pixels)
    found = [
        scored
        for start in range(0, len(tiles), width)
        for scored in score_batch(loaded, tiles[start : start + width], rescue=False)
    ]
    parts = iter(found)
    return [_combined([next(parts) for _ in group], loaded, tiling) for group in cuts]


def _combined(parts: Sequence[Scored], loaded: LoadedMetric, tiling: TilingPolicy) -> Scored:
    """The score of a picture from those of its tiles."""
    seconds = sum(part.seconds for part in parts)
    values = [part.raw for part in parts if part.raw is not None]
    if len(values) < len(parts):
        failed = next(part for part in parts if part.raw is None)
        return Scored(None, failed.status, failed.error_code, seconds)
    tiles = combine(values, loaded.metric.direction)
    return Scored(tiles.chosen(tiling.aggregate), seconds=seconds, tiles=tiles)


def score_batch(loaded: LoadedMetric, pictures: Sequence[Picture], rescue: bool = True) -> list[Scored]:
    """Scores of pictures of one size. Whatever fails a batch is sought by halving; it fails its sample only.

    Out of memory halves the batch as well. A single picture that does not fit is scored in tiles of half its
    longer side, then a quarter; such a score has the status ``success_tiled``. Without ``rescue`` it fails.
    """
    if len(pictures) > 1 and not loaded.metric.batchable:
        return [scored for picture in pictures for scored in score_batch(loaded, [picture], rescue)]
    start = time.monotonic()
    try:
        values = _run(loaded, pictures)
    except (*_PICTURE_ERRORS, MemoryError) as error:
        _require_device(loaded, error)
        failed = _failure(error, time.monotonic() - start)
    else:
        seconds = (time.monotonic() - start) / len(pictures)
        return [
            Scored(value, seconds=seconds)
            if math.isfinite(value)
            else Scored(None, "failed_bad_score", "not_finite", seconds)
            for value in values
        ]
    # Not in the handler: there the error's traceback would hold the tensors of the batch while its halves run.
    return _in_parts(loaded, pictures, failed, rescue)


def _in_parts(loaded: LoadedMetric, pictures: Sequence[Picture], failed: Scored, rescue: bool) -> list[Scored]:
    """Scores of the halves of a batch that failed, or of the one picture that did, in tiles if it did not fit."""
    out_of_memory = failed.status == OUT_OF_MEMORY
    if out_of_memory and loaded.device.startswith("cuda"):
        torch.cuda.empty_cache()
    if len(pictures) > 1:
        half = len(pictures) // 2
        return score_batch(loaded, pictures[:half], rescue) + score_batch(loaded, pictures[half:], rescue)
    return [_rescued(loaded, pictures[0], failed) if rescue and out_of_memory else failed]


def _rescued(loaded: LoadedMetric, picture: Picture, failed: Scored) -> Scored:
    """Score of a picture that does not fit into memory, in ever smaller tiles; ``failed`` if none fits."""
    side = max(picture.shape[:2]) // 2
    while side >= RESCUE_SIDE:
        scored = score_tiles(loaded, [picture], TilingPolicy(size=side), 1)[0]
        if scored.raw is not None:
            return replace(scored, status="success_tiled", error_code=f"tiles_{side}")
        side //= 2
    return failed


def _run(loaded: LoadedMetric, pictures: Sequence[Picture]) -> list[float]:
    """Raw scores of a batch, without gradients."""
    stacked = torch.from_numpy(np.stack(pictures)).to(loaded.device)
    batch = stacked.permute(0, 3, 1, 2).contiguous().float() / 255.0
    with torch.inference_mode():
        scores: Tensor = loaded.scorer(batch)
    if scores.shape != (len(pictures),):
        raise ValueError(f"{loaded.metric.name} returned {tuple(scores.shape)} for {len(pictures)} pictures")
    return [float(value) for value in scores.float().cpu()]


def _require_device(loaded: LoadedMetric, error: BaseException) -> None:
    """Raise if this process cannot compute on its device any more: that is no picture's fault.

    Raises:
        LostWorkerError: after some errors every later call of CUDA in the process fails too.
    """
    if not loaded.device.startswith("cuda"):
        return
    try:
        torch.ones(1, device=loaded.device).add(1).cpu()
    except (RuntimeError, AssertionError) as broken:
        if not _is_out_of_memory(broken):
            line = " ".join(str(error).split())[:200].rstrip(".")
            raise LostWorkerError(
                f"Metric {loaded.metric.name} lost the device {loaded.device}: {line}.",
                "The same command goes on in a new process.",
            ) from error


def _failure(error: BaseException, seconds: float) -> Scored:
    if _is_out_of_memory(error):
        return Scored(None, OUT_OF_MEMORY, "out_of_memory", seconds)
    return Scored(None, FAILED_METRIC, type(error).__name__, seconds)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what lacked: of the CPU, of CUDA, or of a library on it that says so in its own words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY_WORDS)
