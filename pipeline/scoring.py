"""Score the samples of one unit: read in large pieces, decode once, batch equal sizes, survive a bad one."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iqpir.errors import VerificationError
from iqpir.pixels import PictureError, PixelPolicy, decode
from pipeline.corpus import Corpus
from pipeline.layout import sha256_hex
from pipeline.metrics import Metric, Scorer

READ_BYTES = 16 << 20
"""Neighbouring samples are read together up to this many bytes."""
HELD_BATCHES = 8
"""Pictures waiting for others of their size hold at most this many batches' pixels."""

_PICTURE_ERRORS = (RuntimeError, ValueError, ArithmeticError, AssertionError, IndexError)


@dataclass(frozen=True)
class Scored:
    """Score of one sample by one metric; ``raw`` is None unless ``status`` is ``success``."""

    raw: float | None
    status: str = "success"
    error_code: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class LoadedMetric:
    """A metric and its scorer on a device."""

    metric: Metric
    scorer: Scorer
    device: str


Row = Mapping[str, Any]
Picture = NDArray[np.uint8]


def score_samples(
    corpus: Corpus,
    rows: Sequence[Row],
    metrics: Sequence[LoadedMetric],
    policy: PixelPolicy,
    batch_pixels: int,
) -> dict[str, dict[str, Scored]]:
    """Score ``rows`` (sample rows of one unit) with every metric, decoding each sample once.

    Returns:
        metric -> key -> what came out; every row is there for every metric.
    """
    results: dict[str, dict[str, Scored]] = {loaded.metric.name: {} for loaded in metrics}
    for keys, pictures in _batches(_decoded(corpus, rows, policy, results), batch_pixels):
        for loaded in metrics:
            found = score_batch(loaded, pictures)
            results[loaded.metric.name].update(zip(keys, found, strict=True))
    return results


def read_samples(corpus: Corpus, rows: Sequence[Row]) -> Iterator[tuple[Row, bytes]]:
    """Bytes of samples of one shard, in the order of their offsets, by few and large reads.

    Raises:
        VerificationError: the bytes of a sample are not those that were committed.
    """
    ordered = sorted(rows, key=lambda row: (row["shard"], row["byte_offset"]))
    start = 0
    while start < len(ordered):
        first, stop = ordered[start], start + 1
        while (
            stop < len(ordered)
            and ordered[stop]["shard"] == first["shard"]
            and _end(ordered[stop]) - first["byte_offset"] <= READ_BYTES
        ):
            stop += 1
        offset = first["byte_offset"]
        piece = corpus.storage.read_range(first["shard"], offset, _end(ordered[stop - 1]) - offset)
        for row in ordered[start:stop]:
            data = piece[row["byte_offset"] - offset : _end(row) - offset]
            if sha256_hex(data) != row["sha256"]:
                place = f"{corpus.storage.uri(row['shard'])} at byte {row['byte_offset']}"
                raise VerificationError(f"{place} is not what was committed.", "Run jobs/verify.py.")
            yield row, data
        start = stop


def score_batch(loaded: LoadedMetric, pictures: Sequence[Picture]) -> list[Scored]:
    """Scores of pictures of one size. Whatever fails a batch is sought by halving; it fails its sample only.

    Out of memory halves the batch as well; a single picture that does not fit fails alone.
    """
    if len(pictures) > 1 and not loaded.metric.batchable:
        return [scored for picture in pictures for scored in score_batch(loaded, [picture])]
    start = time.monotonic()
    try:
        values = _run(loaded, pictures)
    except (*_PICTURE_ERRORS, MemoryError) as error:
        if len(pictures) > 1:
            half = len(pictures) // 2
            return score_batch(loaded, pictures[:half]) + score_batch(loaded, pictures[half:])
        return [_failure(error, time.monotonic() - start)]
    seconds = (time.monotonic() - start) / len(pictures)
    return [
        Scored(value, seconds=seconds)
        if math.isfinite(value)
        else Scored(None, "failed_bad_score", "not_finite", seconds)
        for value in values
    ]


def _run(loaded: LoadedMetric, pictures: Sequence[Picture]) -> list[float]:
    """Raw scores of a batch, without gradients."""
    stacked = torch.from_numpy(np.stack(pictures)).to(loaded.device)
    batch = stacked.permute(0, 3, 1, 2).contiguous().float() / 255.0
    with torch.inference_mode():
        scores: Tensor = loaded.scorer(batch)
    if scores.shape != (len(pictures),):
        raise ValueError(f"{loaded.metric.name} returned {tuple(scores.shape)} for {len(pictures)} pictures")
    return [float(value) for value in scores.float().cpu()]


def _failure(error: BaseException, seconds: float) -> Scored:
    text = str(error)
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
    )
    if out_of_memory:
        return Scored(None, "failed_out_of_memory", "out_of_memory", seconds)
    return Scored(None, "failed_metric", type(error).__name__, seconds)


def _decoded(
    corpus: Corpus, rows: Sequence[Row], policy: PixelPolicy, results: Mapping[str, dict[str, Scored]]
) -> Iterator[tuple[str, Picture]]:
    """Key and pixels of each sample; one that does not decode becomes a failure in ``results``."""
    for row, data in read_samples(corpus, rows):
        try:
            picture = decode(data, policy)
        except PictureError as error:
            for scored in results.values():
                scored[row["key"]] = Scored(None, "failed_decode", error.code)
        else:
            yield row["key"], picture.array


def _batches(pictures: Iterable[tuple[str, Picture]], batch_pixels: int) -> Iterator[tuple[list[str], list[Picture]]]:
    """Groups of equal size, each of at most ``batch_pixels`` (one picture at least), in bounded memory."""
    waiting: dict[tuple[int, ...], list[tuple[str, Picture]]] = {}
    held = 0
    for key, picture in pictures:
        pixels = picture.shape[0] * picture.shape[1]
        group = waiting.setdefault(picture.shape, [])
        group.append((key, picture))
        held += pixels
        if (len(group) + 1) * pixels > batch_pixels:
            held -= len(group) * pixels
            yield _unzipped(waiting.pop(picture.shape))
        while held > HELD_BATCHES * batch_pixels:
            largest = max(waiting, key=lambda shape: len(waiting[shape]) * shape[0] * shape[1])
            held -= len(waiting[largest]) * largest[0] * largest[1]
            yield _unzipped(waiting.pop(largest))
    for group in waiting.values():
        yield _unzipped(group)


def _unzipped(group: list[tuple[str, Picture]]) -> tuple[list[str], list[Picture]]:
    return [key for key, _ in group], [picture for _, picture in group]


def _end(row: Row) -> int:
    return int(row["byte_offset"]) + int(row["byte_size"])
