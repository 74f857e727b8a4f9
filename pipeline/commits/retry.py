"""Inputs that failed for a reason that passes: which ones another generation may plan again."""

from collections.abc import Sequence

from pipeline.commits.plan import Generation, superseded
from pipeline.commits.records import Finished
from pipeline.documents import objects_of
from pipeline.layout import from_parquet
from pipeline.sources.inputs import TRANSIENT
from pipeline.storage import Storage

_STATUSES = {f"failed_{code}" for code in TRANSIENT}


def passing_failures(
    storage: Storage, generations: Sequence[Generation], records: Finished, collection: str
) -> frozenset[str]:
    """Relative paths of live inputs whose last attempt ended in a code of ``TRANSIENT``.

    Args:
        storage: the corpus.
        generations: its plan.
        records: commit records of the shard step.
        collection: whose inputs count.

    Returns:
        Nothing while planned units are not committed: they may be the next attempt at the same inputs.
    """
    planned = {unit_id for item in generations for unit_id in item.unit_ids()}
    if not all(unit_id in records for unit_id in planned):
        return frozenset()
    hidden = superseded(generations)
    found: set[str] = set()
    for unit_id, record in records.load(planned).items():
        if record["collection"] != collection or not _STATUSES & record["statuses"].keys():
            continue
        (table,) = (ref for ref in objects_of(unit_id, record) if ref.path.startswith("samples/"))
        rows = from_parquet(storage.read(table.path), ["relpath", "status"]).to_pylist()
        failed = {row["relpath"] for row in rows if row["status"] in _STATUSES}
        found |= failed - set(hidden.get(record["ordinal"], ()))
    return frozenset(found)
