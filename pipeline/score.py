"""Score every sample of a corpus: one decode feeds all metrics, each metric commits alone.

A fingerprint covers everything that decides a score: the metric and its version, its weights, the pixel
policy. Scores lie under it, so that a metric can be added or upgraded without touching the others.
"""

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from iqpir.config import digest
from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy
from pipeline.corpus import Corpus
from pipeline.documents import write_document
from pipeline.layout import SCORES, scores_path
from pipeline.manifest import ManifestUnit
from pipeline.metrics import Metric, find_metrics, scorer_digest
from pipeline.records import commit, finished
from pipeline.scoring import LoadedMetric, Scored, score_samples
from pipeline.storage import Storage
from pipeline.units import Failure, RunReport, SchedulingConfig, schedule

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when the way a picture reaches a metric changes; part of every fingerprint."""


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
    batch_pixels: int = 1 << 20
    """Most pixels in a batch; a larger picture is a batch by itself."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels; part of every fingerprint."""
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    """How many units at a time, and where. A worker process keeps its metrics from unit to unit."""

    def __post_init__(self) -> None:
        if self.batch_pixels < 1:
            raise UsageError(f"batch_pixels {self.batch_pixels} is not positive.")
        if self.device.startswith("cuda") and self.scheduling.workers != 1 and not self.scheduling.gpus:
            raise UsageError("Workers on cuda need scheduling.gpus.", "For example --scheduling.gpus 0.25.")


@dataclass(frozen=True)
class ScoreResult:
    """What was scored."""

    corpus: str
    samples: int
    metrics: dict[str, dict[str, Any]]
    """Per metric: fingerprint, samples scored and failed now."""
    skipped_units: int
    """Units that had scores of every metric before."""
    seconds: float


@dataclass(frozen=True)
class _Task:
    """A unit and the metrics that have no record for it."""

    unit: ManifestUnit
    metrics: tuple[str, ...]

    @property
    def unit_id(self) -> str:
        return self.unit.unit_id

    @property
    def ordinal(self) -> int:
        return self.unit.ordinal


def score(config: ScoreConfig) -> ScoreResult:
    """Score what is not scored yet; a sample that fails is a row with a status.

    Raises:
        UsageError: unknown metric, refused licence, missing weights (before any work).
        IncompleteError: units are left; the same command goes on.
    """
    start = time.monotonic()
    corpus = Corpus(config.corpus)
    manifest = corpus.manifest()
    fingerprints = _declare(corpus, config)
    done = {name: finished(corpus.storage, f"score-{name}", found) for name, found in fingerprints.items()}
    tasks = [
        _Task(unit, missing)
        for unit in manifest.units
        if (missing := tuple(name for name in fingerprints if unit.unit_id not in done[name]))
    ]
    counts: dict[str, dict[str, Any]] = {
        name: {"fingerprint": found, "scored": 0, "failed": 0} for name, found in fingerprints.items()
    }
    failures, committed = [], 0
    work = _Work(corpus.storage, fingerprints, config)
    for task, outcome in schedule(iter(tasks), work, len(tasks), "score", config.scheduling):
        if outcome.value is None:
            failures.append(Failure(unit_id=task.unit_id, ordinal=task.ordinal, kind=outcome.kind, error=outcome.error))
            continue
        committed += 1
        for name, (scored, failed) in outcome.value.items():
            counts[name]["scored"] += scored
            counts[name]["failed"] += failed
    _warn_of_failures(counts)
    RunReport(
        total=len(manifest.units),
        skipped=len(manifest.units) - len(tasks),
        done=committed,
        failures=tuple(failures),
    ).require_complete("score")
    return ScoreResult(
        corpus=corpus.storage.url,
        samples=manifest.samples,
        metrics=counts,
        skipped_units=len(manifest.units) - len(tasks),
        seconds=round(time.monotonic() - start, 3),
    )


def metric_facts_path(metric: str, fingerprint: str) -> str:
    """What a fingerprint stands for: ``scores/<metric>/<fingerprint>/_metric.json``."""
    return f"scores/{metric}/{fingerprint}/_metric.json"


def _declare(corpus: Corpus, config: ScoreConfig) -> dict[str, str]:
    """Fingerprint of each metric. All are built before anything is written: that proves their weights at hand."""
    declared: dict[str, dict[str, Any]] = {}
    for metric in find_metrics(config.metrics, commercial_safe=config.commercial_safe):
        scorer = _loaded(metric.name, "cpu", config.weights_uri).scorer
        facts: dict[str, Any] = {
            **metric.facts(),
            "weights_sha256": scorer_digest(scorer),
            "pixels": config.pixels.digest(),
            "format": FORMAT,
        }
        declared[metric.name] = {**facts, "fingerprint": digest(facts)}
    for name, facts in declared.items():
        write_document(corpus.storage, metric_facts_path(name, facts["fingerprint"]), facts)
    return {name: facts["fingerprint"] for name, facts in declared.items()}


@dataclass(frozen=True)
class _Work:
    """Scores a unit with the metrics it lacks and commits each metric alone; picklable."""

    storage: Storage
    fingerprints: dict[str, str]
    config: ScoreConfig

    def __call__(self, task: _Task) -> dict[str, tuple[int, int]]:
        """Metric -> samples scored and failed."""
        corpus = Corpus(self.storage)
        columns = ["key", "shard", "byte_offset", "byte_size", "sha256"]
        rows = corpus.unit_samples(task.unit, columns).to_pylist()
        metrics = [_loaded(name, self.config.device, self.config.weights_uri) for name in task.metrics]
        results = score_samples(corpus, rows, metrics, self.config.pixels, self.config.batch_pixels)
        found = [loaded.metric for loaded in metrics]
        return {metric.name: self._commit(corpus, task.unit, metric, rows, results[metric.name]) for metric in found}

    def _commit(
        self,
        corpus: Corpus,
        unit: ManifestUnit,
        metric: Metric,
        rows: list[dict[str, Any]],
        results: Mapping[str, Scored],
    ) -> tuple[int, int]:
        """Store one metric's table, then its commit record; returns counts of scored and failed."""
        fingerprint = self.fingerprints[metric.name]
        table = _table(rows, results)
        reference = corpus.publish_table(
            table,
            lambda sha256: scores_path(metric.name, fingerprint, unit.ordinal, sha256),
            {"metric": metric.name, "fingerprint": fingerprint, "version": metric.version},
        )
        failed = sum(scored.raw is None for scored in results.values())
        record = {
            "metric": metric.name,
            "objects": [reference.to_dict()],
            "samples": len(rows),
            "success": len(rows) - failed,
            "failed": failed,
        }
        commit(corpus.storage, f"score-{metric.name}", fingerprint, unit.unit_id, record)
        return len(rows) - failed, failed


def _table(rows: list[dict[str, Any]], results: Mapping[str, Scored]) -> pa.Table:
    """``SCORES`` rows in the order of the samples; every sample has one."""
    columns: dict[str, list[Any]] = {name: [] for name in SCORES.names}
    for row in rows:
        scored = results[row["key"]]
        columns["key"].append(row["key"])
        columns["sample_sha256"].append(row["sha256"])
        columns["raw"].append(scored.raw)
        columns["status"].append(scored.status)
        columns["error_code"].append(scored.error_code or None)
        columns["seconds"].append(scored.seconds)
    return pa.table(columns, schema=SCORES)


@functools.lru_cache(maxsize=16)
def _loaded(name: str, device: str, weights_uri: str) -> LoadedMetric:
    """A metric on a device, built once per process: Ray keeps its workers, so weights load once on each."""
    metric = find_metrics([name])[0]
    return LoadedMetric(metric, metric.scorer(device, weights_uri or None), device)


def _warn_of_failures(counts: Mapping[str, Mapping[str, Any]]) -> None:
    for name, found in counts.items():
        if found["failed"]:
            log.warning("%s failed on %d samples; their rows say why", name, found["failed"])
