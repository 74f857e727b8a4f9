"""Read the scores of a corpus: which editions there are, and one row per live sample and metric."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from iqpir.errors import IncompleteError, UsageError, VerificationError
from pipeline.commits.manifest import ManifestUnit
from pipeline.commits.records import Record, finished
from pipeline.corpus import Corpus
from pipeline.documents import in_threads, unstamped
from pipeline.layout import from_parquet, sha256_hex


@dataclass(frozen=True)
class UnitScores:
    """Scores of one unit's live samples, by key; raw scores [N], NaN where the metric failed."""

    unit: ManifestUnit
    keys: pa.ChunkedArray
    raw: dict[str, NDArray[np.float64]]
    statuses: dict[str, pa.ChunkedArray]
    retries: dict[str, int]
    """Metric -> how often the unit was scored again, where it was."""


def read_metric_facts(corpus: Corpus, metric: str, chosen: Mapping[str, str]) -> dict[str, Any]:
    """Facts of the one edition of a metric's scores that is meant (``scores/<metric>/<fingerprint>``).

    Raises:
        UsageError: there is no corpus, no edition, or there are several and none is chosen.
    """
    paths = [e.path for e in corpus.storage.list(f"scores/{metric}") if e.path.endswith("/_metric.json")]
    editions = {path.split("/")[2]: path for path in paths}
    wanted = chosen.get(metric) or (next(iter(editions)) if len(editions) == 1 else "")
    if wanted not in editions:
        if not editions:
            corpus.manifest()  # where there is no corpus, that is the first thing to say
            raise UsageError(
                f"The corpus {corpus.storage.url} has no scores of {metric!r}.", "Run jobs/score.py first."
            )
        raise UsageError(
            f"Scores of {metric!r} exist in the editions {', '.join(sorted(editions))}.",
            f"Choose one: --fingerprints.{metric}.",
        )
    return unstamped(json.loads(corpus.storage.read(editions[wanted])))


def read_scores(corpus: Corpus, facts: Mapping[str, Mapping[str, Any]]) -> list[UnitScores]:
    """Scores of every unit; every live sample has a row for every metric.

    Raises:
        IncompleteError: a metric has not scored every unit.
        VerificationError: a table is damaged or lacks a sample.
    """
    records: dict[str, dict[str, Record]] = {}
    units = corpus.manifest().units
    for metric, found in facts.items():
        done = finished(corpus.storage, f"score-{metric}", found["fingerprint"])
        left = sum(unit.unit_id not in done for unit in units)
        if left:
            raise IncompleteError(
                f"{metric} has not scored {left} of {len(units)} units.", "Run jobs/score.py with it first."
            )
        records[metric] = done.load([unit.unit_id for unit in units])

    def read(unit: ManifestUnit) -> UnitScores:
        keys = corpus.unit_samples(unit, ["key"])["key"]
        raw, statuses = {}, {}
        for metric in facts:
            table = read_table(corpus, records[metric][unit.unit_id]["objects"][0])
            position = pc.index_in(keys, value_set=table["key"].combine_chunks())
            if position.null_count:
                raise VerificationError(
                    f"{position.null_count} samples of unit {unit.ordinal:06d} have no score of {metric}."
                )
            rows = table.take(position)
            raw[metric] = rows["raw"].to_numpy(zero_copy_only=False).astype(np.float64)
            statuses[metric] = rows["status"]
        found = {metric: int(records[metric][unit.unit_id].get("retry", 0)) for metric in facts}
        return UnitScores(unit, keys, raw, statuses, {metric: retry for metric, retry in found.items() if retry})

    return in_threads(read, units)


def read_table(corpus: Corpus, reference: Mapping[str, Any]) -> pa.Table:
    """The table of an object reference, once its bytes have the sha256 of the reference.

    Raises:
        VerificationError: they have not.
    """
    data = corpus.storage.read(reference["path"])
    if sha256_hex(data) != reference["sha256"]:
        raise VerificationError(
            f"{corpus.storage.uri(reference['path'])} is not what its record says.", "Run jobs/verify.py."
        )
    return from_parquet(data)
