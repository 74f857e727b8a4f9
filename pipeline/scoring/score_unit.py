"""Score one unit with the metrics it lacks, and commit each metric alone; metrics are loaded once a process."""

import functools
import json
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from iqpir.errors import IqpirError, PermanentError, VerificationError
from pipeline.commits.manifest import ManifestUnit
from pipeline.commits.records import commit
from pipeline.corpus import Corpus
from pipeline.layout import SCORES, TILED_SCORES, scores_path
from pipeline.metrics import find_metrics, scorer_digest, scorer_dtypes
from pipeline.scoring.batches import LoadedMetric, Scored
from pipeline.scoring.cascade import SKIPPED
from pipeline.scoring.passes import CRASHES, FAILED_DECODE, Known, Scoring, breakage, score_samples
from pipeline.scoring.retries import RETRIABLE, retriable
from pipeline.scoring.tables import read_table
from pipeline.scoring.tiling import TileScores
from pipeline.storage import Storage


@dataclass(frozen=True)
class ScoreTask:
    """A unit and the metrics that have no record for it."""

    unit: ManifestUnit
    metrics: tuple[str, ...]
    compared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Metric that a gate compares and that is scored already -> its table (``ObjectRef.to_dict``)."""
    former: Mapping[str, Any] = field(default_factory=dict)
    """The table of the one metric whose failures are scored again; empty otherwise."""
    retry: int = 0
    """With ``former``: number of the record that takes the place of that table's."""

    @property
    def unit_id(self) -> str:
        """Of the unit."""
        return self.unit.unit_id

    @property
    def ordinal(self) -> int:
        """Of the unit."""
        return self.unit.ordinal


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What is the same for every unit of a pass; picklable."""

    how: Scoring
    device: str
    weights_uri: str
    max_failed: float
    """Largest fraction of a unit's samples that a metric may fail on."""


def prove_metrics(
    names: Sequence[str], weights_uri: str = "", *, commercial_safe: bool = False
) -> dict[str, dict[str, Any]]:
    """Build each metric on the CPU and return what decides its scores, the digest of its weights among it.

    Raises:
        UsageError: an unknown name, a refused licence, or weights that are absent (naming file and place).
    """
    return {
        metric.name: {**metric.facts(), "weights_sha256": load_metric(metric.name, "cpu", weights_uri).weights_sha256}
        for metric in find_metrics(names, commercial_safe=commercial_safe)
    }


@functools.lru_cache(maxsize=16)
def load_metric(name: str, device: str, weights_uri: str) -> LoadedMetric:
    """A metric on a device, built once per process; its weights' digest is taken before it has run."""
    metric = find_metrics([name])[0]
    scorer = metric.scorer(device, weights_uri or None)
    return LoadedMetric(metric, scorer, device, scorer_digest(scorer))


@dataclass(frozen=True)
class UnitScorer:
    """Scores a unit with the metrics it lacks and commits each metric alone; picklable."""

    storage: Storage
    declared: dict[str, dict[str, Any]]
    plan: ScorePlan

    def __call__(self, task: ScoreTask) -> dict[str, dict[str, int]]:
        """Metric -> counts of samples scored, failed and skipped.

        Raises:
            IqpirError, OSError: a metric is broken or failed on too many samples; the others are committed.
        """
        corpus, plan = Corpus(self.storage), self.plan
        columns = ["key", "shard", "byte_offset", "byte_size", "sha256"]
        rows = corpus.unit_samples(task.unit, columns).to_pylist()
        known = {name: _raw_by_key(read_table(corpus, table)) for name, table in task.compared.items()}
        if task.former:
            return self._again(corpus, task, rows, known)
        metrics, broken = self._load(task.metrics)
        scored = score_samples(corpus, rows, metrics, plan.how, known, broken)
        counts, failures = {}, []
        for name in task.metrics:
            try:
                counts[name] = self._keep(corpus, task.unit, name, rows, scored.of(name))
            except (IqpirError, OSError) as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return counts

    def _again(
        self, corpus: Corpus, task: ScoreTask, rows: list[dict[str, Any]], known: Known
    ) -> dict[str, dict[str, int]]:
        """As ``__call__``, for the failures of one metric alone; a table in which nothing changed is not stored."""
        (name,) = task.metrics
        former = read_table(corpus, task.former)
        wanted = retriable(former, known)
        rows = [row for row in rows if row["key"] in wanted]
        metrics, broken = self._load(task.metrics if rows else ())
        results = score_samples(corpus, rows, metrics, self.plan.how, known, broken).of(name) if rows else {}
        changed = {key: scored for key, scored in results.items() if scored.status not in RETRIABLE}
        if changed:
            tiled = self.plan.how.tiling.size > 0
            fresh = {row["key"]: row for row in _table(rows, results, tiled=tiled).to_pylist()}
            merged = [fresh[row["key"]] if row["key"] in changed else row for row in former.to_pylist()]
            table = pa.Table.from_pylist(merged, former.schema.remove_metadata())
            self._commit(corpus, task.unit, name, table, task.retry)
        skipped = sum(scored.status == SKIPPED for scored in changed.values())
        failed = sum(scored.raw is None for scored in results.values()) - skipped
        return {name: {"scored": len(results) - failed - skipped, "failed": failed, "skipped": skipped}}

    def _load(self, names: Sequence[str]) -> tuple[list[LoadedMetric], dict[str, IqpirError | OSError]]:
        """The metrics on this worker, and why some of them are not."""
        found, broken = [], dict[str, IqpirError | OSError]()
        for name in names:
            try:
                found.append(self._loaded(name))
            except (IqpirError, OSError, RuntimeError, *CRASHES) as error:
                broken[name] = breakage(name, error)
        return found, broken

    def _loaded(self, name: str) -> LoadedMetric:
        """The metric on this worker.

        Raises:
            VerificationError: it has other weights than the fingerprint says.
        """
        loaded = load_metric(name, self.plan.device, self.plan.weights_uri)
        declared = self.declared[name]["weights_sha256"]
        if loaded.weights_sha256 != declared:
            raise VerificationError(
                f"Metric {name} has the weights {loaded.weights_sha256[:12]} on {socket.gethostname()}, "
                f"the driver has {declared[:12]}.",
                "Empty that machine's cache of weights, or give every machine the same weights_uri.",
            )
        return loaded

    def _keep(
        self,
        corpus: Corpus,
        unit: ManifestUnit,
        name: str,
        rows: list[dict[str, Any]],
        results: Mapping[str, Scored],
    ) -> dict[str, int]:
        """Store what one metric made of a unit; returns counts of scored, failed and skipped.

        Raises:
            PermanentError: it failed on too many samples.
        """
        _require_few_failures(unit, name, results.values(), self.plan.max_failed)
        return self._commit(corpus, unit, name, _table(rows, results, tiled=self.plan.how.tiling.size > 0))

    def _commit(self, corpus: Corpus, unit: ManifestUnit, name: str, table: pa.Table, retry: int = 0) -> dict[str, int]:
        """Store one metric's table, then its commit record; returns counts of scored, failed and skipped."""
        facts = self.declared[name]
        fingerprint = str(facts["fingerprint"])
        reference = corpus.publish_table(
            table, lambda sha256: scores_path(name, fingerprint, unit.ordinal, sha256), self._footer(name, facts)
        )
        skipped = pc.sum(pc.equal(table["status"], SKIPPED)).as_py() or 0
        failed = table["raw"].null_count - skipped
        record = {
            "metric": name,
            "objects": [reference.to_dict()],
            "samples": table.num_rows,
            "success": table.num_rows - failed - skipped,
            "failed": failed,
            **({"skipped": skipped} if "cascade" in facts else {}),
        }
        commit(corpus.storage, f"score-{name}", fingerprint, unit.unit_id, record, retry)
        return {"scored": table.num_rows - failed - skipped, "failed": failed, "skipped": skipped}

    def _footer(self, name: str, facts: Mapping[str, Any]) -> dict[str, str]:
        """Where the numbers of a file come from, in its own footer."""
        loaded = self._loaded(name)
        metric = loaded.metric
        batches = {"pixels": self.plan.how.batch_pixels, "pictures": "many" if metric.batchable else "one"}
        used = {"dtype": scorer_dtypes(loaded.scorer), "device": self.plan.device, "torch": torch.__version__}
        provenance = {**facts, **used, "batch": batches}
        return {
            "metric": metric.name,
            "fingerprint": str(facts["fingerprint"]),
            "version": metric.version,
            "provenance": json.dumps(provenance, sort_keys=True),
        }


def _require_few_failures(unit: ManifestUnit, metric: str, results: Iterable[Scored], limit: float) -> None:
    """Refuse what a metric did to a unit if it failed on more than the fraction ``limit`` of what it was shown.

    Raises:
        PermanentError: it did; that is taken for the metric's fault, not the pictures'.
    """
    shown = [scored for scored in results if scored.status not in (SKIPPED, FAILED_DECODE)]
    failed = Counter(f"{scored.status} {scored.error_code}" for scored in shown if scored.raw is None)
    if failed.total() > limit * len(shown):
        reason, _ = failed.most_common(1)[0]
        raise PermanentError(
            f"Metric {metric} failed on {failed.total()} of {len(shown)} samples of unit {unit.ordinal:06d}, "
            f"most often with {reason}; none of them is committed.",
            f"Put the metric right, or accept such rows with a higher --max_failed than {limit:g}.",
        )


def _raw_by_key(table: pa.Table) -> dict[str, float | None]:
    return dict(zip(table["key"].to_pylist(), table["raw"].to_pylist(), strict=True))


def _table(rows: list[dict[str, Any]], results: Mapping[str, Scored], *, tiled: bool) -> pa.Table:
    """``SCORES`` (or ``TILED_SCORES``) rows in the order of the samples; every sample has one."""
    schema = TILED_SCORES if tiled else SCORES
    found = [
        {
            "key": row["key"],
            "sample_sha256": row["sha256"],
            "raw": scored.raw,
            "status": scored.status,
            "error_code": scored.error_code or None,
            "seconds": scored.seconds,
            **(_tile_columns(scored.tiles) if tiled else {}),
        }
        for row in rows
        for scored in [results[row["key"]]]
    ]
    return pa.Table.from_pylist(found, schema)


def _tile_columns(tiles: TileScores | None) -> dict[str, Any]:
    if tiles is None:
        return {}
    return {"tiles": tiles.tiles, "tile_mean": tiles.mean, "tile_p10": tiles.p10, "tile_min": tiles.min}
