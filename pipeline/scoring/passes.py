"""Score the samples of one unit: read in large pieces, decode once, batch equal sizes, ask the cascade."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iqpir.errors import IqpirError, PermanentError, VerificationError
from iqpir.pixels import PictureError, PixelPolicy, decode
from pipeline.corpus import Corpus
from pipeline.layout import sha256_hex
from pipeline.scoring.batches import LoadedMetric, Scored, score_pictures
from pipeline.scoring.cascade import SKIPPED, Gate, in_order
from pipeline.scoring.tiling import Picture, TilingPolicy

log = logging.getLogger(__name__)

READ_BYTES = 16 << 20
"""Neighbouring samples are read together up to this many bytes."""
HELD_BATCHES = 8
"""Pictures waiting for others of their size hold at most this many batches' pixels."""

FAILED_DECODE = "failed_decode"
"""Status of a sample that the pixel policy refuses."""
CRASHES = (TypeError, LookupError, AttributeError, NameError, ImportError)
"""What the code of a metric raises that is broken, whatever the picture."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a pass over samples is done: what is picklable and the same for every unit."""

    pixels: PixelPolicy
    batch_pixels: int
    tiling: TilingPolicy = field(default_factory=TilingPolicy)
    gates: Mapping[str, Gate] = field(default_factory=dict)


Row = Mapping[str, Any]
Known = Mapping[str, Mapping[str, float | None]]
"""metric -> key -> raw score of an earlier pass."""


@dataclass(frozen=True)
class UnitScored:
    """What came out of a pass over one unit."""

    results: dict[str, dict[str, Scored]]
    """metric -> key -> what came out; every row is there for every metric that is not in ``broken``."""
    broken: dict[str, IqpirError | OSError]
    """metric -> why it has no results here."""

    def of(self, metric: str) -> dict[str, Scored]:
        """The results of a metric.

        Raises:
            IqpirError, OSError: it is broken.
        """
        if metric in self.broken:
            raise self.broken[metric]
        return self.results[metric]


def score_samples(
    corpus: Corpus,
    rows: Sequence[Row],
    metrics: Sequence[LoadedMetric],
    how: Scoring,
    known: Known | None = None,
    broken: Mapping[str, IqpirError | OSError] | None = None,
) -> UnitScored:
    """Score ``rows`` (sample rows of one unit) with every metric, decoding each sample once.

    A metric whose code breaks is dropped with those that wait for its scores; the others go on.

    Args:
        corpus: where they are.
        rows: have ``key`` and the place of the bytes.
        metrics: those that have no scores of this unit.
        how: pixels, batches, tiles and gates.
        known: raw scores of this unit by the metrics that gates compare and that are not in ``metrics``.
        broken: metrics that could not be loaded, and why.
    """
    results: dict[str, dict[str, Scored]] = {loaded.metric.name: {} for loaded in metrics}
    known, broken = known or {}, dict(broken or {})
    order = in_order(list(results), how.gates)
    by_name = {loaded.metric.name: loaded for loaded in metrics}
    broken |= _waiting(order, broken, how.gates)
    wanted = _skip_unread(rows, {name: results[name] for name in order if name not in broken}, how.gates, known)
    for keys, pictures in _batches(_decoded(corpus, wanted, how.pixels, results), how.batch_pixels):
        for name in order:
            if name in broken:
                continue
            chosen = _let_through(name, keys, results, how.gates, known)
            if not chosen:
                continue
            try:
                found = score_pictures(by_name[name], [pictures[at] for at in chosen], how.tiling, how.batch_pixels)
            except (*CRASHES, OSError) as error:
                broken[name] = breakage(name, error)
                broken |= _waiting(order, broken, how.gates)
            else:
                results[name].update(zip((keys[at] for at in chosen), found, strict=True))
    return UnitScored({name: found for name, found in results.items() if name not in broken}, broken)


def breakage(name: str, error: Exception) -> IqpirError | OSError:
    """What a unit fails with for a metric that raised ``error``; what may pass is kept as it is."""
    if isinstance(error, IqpirError | OSError):
        return error
    log.error("metric %s is broken", name, exc_info=error)
    line = " ".join(str(error).split())[:200].rstrip(".")
    return PermanentError(
        f"Metric {name} is broken: {type(error).__name__}: {line}.",
        "The other metrics of the run are committed; the log has the traceback.",
    )


def _waiting(
    order: Sequence[str], broken: Mapping[str, IqpirError | OSError], gates: Mapping[str, Gate]
) -> dict[str, IqpirError | OSError]:
    """Metrics that compare the scores of a broken one, each with that one's failure."""
    found = dict(broken)
    for name in order:
        compared = gates[name].metrics if name in gates else ()
        cause = next((other for other in compared if other in found), None)
        if name not in found and cause is not None:
            found[name] = found[cause]
    return found


def _let_through(
    name: str, keys: Sequence[str], results: dict[str, dict[str, Scored]], gates: Mapping[str, Gate], known: Known
) -> list[int]:
    """Positions of the keys that the gate of a metric lets through; the others get a row that says why not."""
    chosen = []
    for at, key in enumerate(keys):
        reason = _refusal(name, key, results, gates, known)
        if reason:
            results[name][key] = Scored(None, SKIPPED, reason)
        else:
            chosen.append(at)
    return chosen


def _refusal(
    name: str, key: str, results: Mapping[str, Mapping[str, Scored]], gates: Mapping[str, Gate], known: Known
) -> str:
    if name not in gates:
        return ""
    scores = {
        metric: results[metric][key].raw if metric in results else known[metric].get(key)
        for metric in gates[name].metrics
    }
    return gates[name].refusal(scores)


def _skip_unread(
    rows: Sequence[Row], results: dict[str, dict[str, Scored]], gates: Mapping[str, Gate], known: Known
) -> list[Row]:
    """The rows that some metric wants; where earlier scores settle that none does, nothing is read or decoded."""
    if any(name not in gates or not known.keys() >= set(gates[name].metrics) for name in results):
        return list(rows)
    wanted = []
    for row in rows:
        reasons = {name: _refusal(name, row["key"], {}, gates, known) for name in results}
        if all(reasons.values()):
            for name, reason in reasons.items():
                results[name][row["key"]] = Scored(None, SKIPPED, reason)
        else:
            wanted.append(row)
    return wanted


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


def _decoded(
    corpus: Corpus, rows: Sequence[Row], policy: PixelPolicy, results: Mapping[str, dict[str, Scored]]
) -> Iterator[tuple[str, Picture]]:
    """Key and pixels of each sample; one that does not decode becomes a failure in ``results``."""
    for row, data in read_samples(corpus, rows):
        try:
            picture = decode(data, policy)
        except PictureError as error:
            for scored in results.values():
                scored[row["key"]] = Scored(None, FAILED_DECODE, error.code)
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
