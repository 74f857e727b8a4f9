"""Score every sample of a corpus: one decode feeds all metrics, each metric commits alone.

A fingerprint covers everything that decides a score: the metric and its version, its weights, the pixel
policy, tiles and the cascade where there are some. Scores lie under it, so that a metric can be added or upgraded
without touching the others.
"""

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from iqpir.config import digest
from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy
from pipeline.commits.manifest import ManifestUnit
from pipeline.commits.records import Finished, finished
from pipeline.commits.units import ActorPool, Failure, RunReport, SchedulingConfig, schedule, uses_ray
from pipeline.corpus import Corpus
from pipeline.documents import stamped, write_document
from pipeline.layout import metric_facts_path
from pipeline.metrics import find_metrics
from pipeline.scoring.cascade import Gate, in_order, parse_cascade
from pipeline.scoring.passes import Scoring
from pipeline.scoring.retries import may_be_retried
from pipeline.scoring.score_unit import ScorePlan, ScoreTask, UnitScorer, prove_metrics
from pipeline.scoring.tiling import TilingPolicy

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when the way a picture reaches a metric changes; part of every fingerprint."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """The pool of actors that score on Ray."""

    actors: int | str = ""
    """How many: 4, or 1..4 for one at first and as many again, up to four, when all are busy and units wait. On this
    machine unless RAY_ADDRESS is set. By default scheduling.workers, all at once."""
    idle_seconds: float = 5.0
    """An actor without work for so long gives its CPUs and GPUs back."""

    def __post_init__(self) -> None:
        self.range()
        if self.idle_seconds < 0:
            raise UsageError(f"scoring.idle_seconds {self.idle_seconds} is negative.")

    def range(self) -> tuple[int, int] | None:
        """Least and most actors; None where nothing is said."""
        if self.actors == "":
            return None
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(self.actors))
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise UsageError(f"scoring.actors {self.actors!r} is no number and no range.", "Write 4, or 1..4.")
        return least, most


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which corpus is scored by which metrics, and how."""

    corpus: str
    """Folder or URL of a sealed corpus."""
    metrics: list[str] = field(default_factory=lambda: ["piqe", "niqe", "rank"])
    """Names: rank, rank_judge, piqe, niqe (no download), pyiqa's no-reference metrics, entry points."""
    weights_uri: str = ""
    """Folder or URL with weight files and their SHA256SUMS, for metrics that are not embedded."""
    commercial_safe: bool = False
    """Refuse metrics whose licence forbids commercial use."""
    device: str = "cpu"
    """Where metrics run: cpu or cuda."""
    batch_pixels: int = 0
    """Most pixels in a batch; a larger picture is a batch by itself. 0: 2^20 on cuda and 2^18 on a CPU, where the
    memory of a larger layer is mapped anew each time: four pictures of 512 x 512 took twice as long as one by one."""
    tiling: TilingPolicy = field(default_factory=TilingPolicy)
    """Whether pictures are cut into tiles; part of every fingerprint where they are."""
    cascade: dict[str, str] = field(default_factory=dict)
    """Metric -> condition on raw scores of other metrics, such as {"musiq": "rank > 0.3"}: samples that do not
    meet it are not scored by that metric. Part of its fingerprint. Several conditions: joined by and."""
    retry: bool = False
    """Once every unit is scored, score samples again that failed for a reason that may pass (failed_metric and
    failed_out_of_memory), and those that a cascade skipped for want of such a score."""
    max_failed: float = 0.5
    """Largest part of a unit's samples that a metric may fail on; a unit with more is not committed for that metric.
    1 accepts any."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels; part of every fingerprint."""
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    """How many units at a time, and where. On Ray, workers are actors that keep their metrics from unit to unit,
    each with scheduling.cpus and scheduling.gpus (parts such as 0.25 share a GPU)."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How many actors there are, and for how long."""

    def __post_init__(self) -> None:
        if self.batch_pixels < 0:
            raise UsageError(f"batch_pixels {self.batch_pixels} is negative.")
        if not 0.0 <= self.max_failed <= 1.0:
            raise UsageError(f"max_failed {self.max_failed} is outside 0 to 1.")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device {self.device!r} is neither cpu nor cuda.")
        if self.scoring.actors and self.scheduling.workers != 1:
            raise UsageError("scoring.actors and scheduling.workers say the same.", "Give one of them.")
        parse_cascade(self.cascade, self.metrics)

    def pool(self) -> tuple[SchedulingConfig, ActorPool]:
        """Where units are run, and by how many actors if that is Ray."""
        least, most = self.scoring.range() or (0, self.scheduling.workers)
        return replace(self.scheduling, workers=most), ActorPool(least=least, idle_seconds=self.scoring.idle_seconds)

    def plan(self) -> ScorePlan:
        """The part of it that workers need."""
        how = Scoring(
            pixels=self.pixels,
            batch_pixels=self.batch_pixels or (1 << 20 if self.device.startswith("cuda") else 1 << 18),
            tiling=self.tiling,
            gates=parse_cascade(self.cascade, self.metrics),
        )
        return ScorePlan(how=how, device=self.device, weights_uri=self.weights_uri, max_failed=self.max_failed)


@dataclass(frozen=True)
class ScoreResult:
    """What was scored."""

    corpus: str
    samples: int
    metrics: dict[str, dict[str, Any]]
    """Per metric: fingerprint, samples scored, failed and skipped by the cascade now."""
    skipped_units: int
    """Units that had scores of every metric before."""
    seconds: float


def score(config: ScoreConfig) -> ScoreResult:
    """Score what is not scored yet; a sample that fails is a row with a status.

    Raises:
        UsageError: unknown metric, refused licence, missing weights (before any work).
        IncompleteError: units are left; the same command goes on.
        PermanentError: a metric is broken, or fails on too many samples; the others are committed.
    """
    start = time.monotonic()
    corpus = Corpus(config.corpus)
    manifest = corpus.manifest()
    _require_device(config)
    declared = _declare(corpus, config)
    _warn_of_licences(config.metrics)
    gates = parse_cascade(config.cascade, config.metrics)
    tasks = _tasks(manifest.units, _done(corpus, declared, config.metrics), gates)
    counts: dict[str, dict[str, Any]] = {
        name: {"fingerprint": found["fingerprint"], "scored": 0, "failed": 0, "skipped": 0}
        for name, found in declared.items()
    }
    work = UnitScorer(corpus.storage, declared, config.plan())
    _run(config, work, tasks, len(manifest.units), counts)
    # In the order of the cascade: what a metric has now decides what the next one may see.
    for name in in_order(config.metrics, gates) if config.retry else ():
        done = _done(corpus, declared, (name, *(gates[name].metrics if name in gates else ())))
        again = _retries(manifest.units, done, name)
        _run(config, work, again, len(again), counts)
    return ScoreResult(
        corpus=corpus.storage.url,
        samples=manifest.samples,
        metrics=counts,
        skipped_units=len(manifest.units) - len(tasks),
        seconds=round(time.monotonic() - start, 3),
    )


def _require_device(config: ScoreConfig) -> None:
    """Check that there can be a CUDA device where the metrics run.

    Raises:
        UsageError: this process has none, or workers on Ray are given none.
    """
    scheduling, _ = config.pool()
    if not config.device.startswith("cuda"):
        return
    if uses_ray(scheduling.workers):
        if not scheduling.gpus:
            raise UsageError("Workers on cuda need scheduling.gpus.", "For example --scheduling.gpus 0.25.")
    elif not torch.cuda.is_available():
        raise UsageError(
            "device cuda: there is no CUDA device on this machine, or torch is its CPU build.",
            "Use --device cpu, or workers of a cluster: RAY_ADDRESS and --scheduling.gpus.",
        )


def _run(
    config: ScoreConfig, work: UnitScorer, tasks: Sequence[ScoreTask], total: int, counts: dict[str, dict[str, Any]]
) -> None:
    """Do ``tasks``, all that is left of ``total`` units, and add up what became of their samples.

    Raises:
        IncompleteError, PermanentError: as ``score``.
    """
    failures, committed = [], 0
    for task, outcome in schedule(iter(tasks), work, len(tasks), "score", *config.pool()):
        if outcome.value is None:
            failures.append(Failure(unit_id=task.unit_id, ordinal=task.ordinal, kind=outcome.kind, error=outcome.error))
            continue
        committed += 1
        for name, found in outcome.value.items():
            for kind, count in found.items():
                counts[name][kind] += count
    _warn_of_failures(counts)
    report = RunReport(total=total, skipped=total - len(tasks), done=committed, failures=tuple(failures))
    report.require_complete("score")


def _done(corpus: Corpus, declared: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Finished]:
    return {name: finished(corpus.storage, f"score-{name}", declared[name]["fingerprint"]) for name in names}


def _tasks(units: Sequence[ManifestUnit], done: Mapping[str, Finished], gates: Mapping[str, Gate]) -> list[ScoreTask]:
    """Units with the metrics that have no record for them, and the tables of scores that their gates compare."""
    tasks = []
    for unit in units:
        missing = tuple(name for name in done if unit.unit_id not in done[name])
        compared = {other for name in missing if name in gates for other in gates[name].metrics} - set(missing)
        if missing:
            tasks.append(ScoreTask(unit, missing, {other: {} for other in compared}))
    tables = {
        other: found.load([task.unit_id for task in tasks if other in task.compared]) for other, found in done.items()
    }
    return [
        replace(task, compared={other: tables[other][task.unit_id]["objects"][0] for other in task.compared})
        for task in tasks
    ]


def _retries(units: Sequence[ManifestUnit], done: Mapping[str, Finished], name: str) -> list[ScoreTask]:
    """Units that have failures of a metric, or samples that a cascade kept from it."""
    records = {metric: found.load([unit.unit_id for unit in units]) for metric, found in done.items()}
    tables = {
        metric: {unit_id: record["objects"][0] for unit_id, record in found.items()}
        for metric, found in records.items()
    }
    return [
        ScoreTask(
            unit,
            (name,),
            compared={other: table[unit.unit_id] for other, table in tables.items() if other != name},
            former=tables[name][unit.unit_id],
            retry=records[name][unit.unit_id].get("retry", 0) + 1,
        )
        for unit in units
        if may_be_retried(records[name][unit.unit_id])
    ]


def _declare(corpus: Corpus, config: ScoreConfig) -> dict[str, dict[str, Any]]:
    """Facts of each metric, its fingerprint among them. All metrics are built before anything is written: that
    proves their weights at hand."""
    found = prove_metrics(config.metrics, config.weights_uri, commercial_safe=config.commercial_safe)
    gates = parse_cascade(config.cascade, config.metrics)
    declared: dict[str, dict[str, Any]] = {}
    for name in in_order(config.metrics, gates):
        facts = {**found[name], "pixels": config.pixels.digest(), "format": FORMAT, **config.tiling.facts()}
        if name in gates:
            fingerprints = {other: declared[other]["fingerprint"] for other in gates[name].metrics}
            facts["cascade"] = gates[name].facts(fingerprints)
        declared[name] = {**facts, "fingerprint": digest(facts)}
    for name, facts in declared.items():
        policy = {"pixel_policy": asdict(config.pixels)}
        write_document(corpus.storage, metric_facts_path(name, facts["fingerprint"]), stamped({**facts, **policy}))
    return {name: declared[name] for name in config.metrics}


def _warn_of_licences(names: Sequence[str]) -> None:
    """Say once a run which scores may not be used commercially; each file of scores has the licence as well."""
    bound = [metric for metric in find_metrics(names) if not metric.commercial]
    for licence in dict.fromkeys(metric.licence for metric in bound):
        listing = ", ".join(metric.name for metric in bound if metric.licence == licence)
        log.warning("%s: %s; --commercial-safe refuses such metrics", listing, licence)


def _warn_of_failures(counts: Mapping[str, Mapping[str, Any]]) -> None:
    for name, found in counts.items():
        if found["failed"]:
            log.warning("%s failed on %d samples; their rows say why", name, found["failed"])
