"""The simple way to find out what is left: ask the storage about the record of each unit."""

from collections.abc import Iterable

from pipeline.commits.plan import ShardUnit
from pipeline.storage import Storage


def count_done(storage: Storage, prefix: str, units: Iterable[ShardUnit]) -> int:
    """How many of ``units`` have a record below ``prefix``; on S3 a request each."""
    return sum(storage.exists(f"{prefix}/{unit.unit_id}.json") for unit in units)
