"""Which rows of scores ``jobs/score.py --retry`` makes again: failures that may pass, and what waited for them."""

import pyarrow as pa

from pipeline.commits.records import Record
from pipeline.scoring.batches import FAILED_METRIC, OUT_OF_MEMORY
from pipeline.scoring.cascade import SKIPPED, UNKNOWN
from pipeline.scoring.passes import Known

RETRIABLE = frozenset({FAILED_METRIC, OUT_OF_MEMORY})
"""Statuses that another machine or a repaired metric may change. The others follow from the picture."""


def may_be_retried(record: Record) -> bool:
    """Whether the table of a commit record can have rows that may be scored again."""
    return bool(record["failed"] or record.get("skipped"))


def retriable(table: pa.Table, known: Known) -> frozenset[str]:
    """Keys of the rows that may come out otherwise.

    Args:
        table: scores of one metric.
        known: metric -> key -> raw score, of those that its gate compares.
    """
    rows = table.select(["key", "status", "error_code"]).to_pylist()
    return frozenset(row["key"] for row in rows if row["status"] in RETRIABLE or _has_waited(row, known))


def _has_waited(row: dict[str, str | None], known: Known) -> bool:
    """Whether a sample was skipped because it lacked a score that it has now."""
    if row["status"] != SKIPPED or not (row["error_code"] or "").startswith(UNKNOWN):
        return False
    metric = (row["error_code"] or "").removeprefix(UNKNOWN)
    return known[metric].get(row["key"] or "") is not None
