"""Seal a corpus: when every planned unit is committed, write the manifest that readers start from.

The manifest holds no time, host or attempt: any number of workers, interruptions and resumptions give the
same bytes. Its JSON document claims a version (create-if-absent), the table follows, then ``_SUCCESS``.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from iqpir.errors import IncompleteError, PermanentError, UsageError, VerificationError
from pipeline import layout
from pipeline.commits.manifest import Manifest, ManifestUnit, manifest_version, read_manifest, shard_list
from pipeline.commits.plan import Generation, superseded
from pipeline.commits.records import Finished, Record
from pipeline.documents import in_threads, objects_of, read_document, require_keys, write_document
from pipeline.layout import MANIFEST, from_parquet, manifest_path, sha256_hex, to_json, to_parquet
from pipeline.storage import Entry, Storage

log = logging.getLogger(__name__)

COUNTS = ("inputs", "success", "rejected", "failed", "samples")


def seal(storage: Storage, generations: Sequence[Generation], records: Finished) -> Manifest:
    """The manifest of everything that is planned; a new version only if anything changed.

    Args:
        storage: the corpus.
        generations: its plan.
        records: commit records of the shard step.

    Raises:
        IncompleteError: units without a commit record.
        VerificationError: a committed object is missing or has another size.
        PermanentError: not one input of the corpus gave a sample; nothing is sealed.
    """
    planned = {unit_id: ordinal for item in generations for unit_id, ordinal in item.unit_ids().items()}
    _require_committed(planned, records)
    replaced = superseded(generations)
    manifest = _former(storage)
    sizes = _sizes(storage)
    if manifest is not None and _is_current(manifest, planned, replaced, sizes):
        listed = storage.exists(layout.SHARD_LIST) and storage.read(layout.SHARD_LIST)
        return manifest if listed == shard_list(manifest.units) else _point_to_newest(storage)
    former = {unit.unit_id: unit for unit in manifest.units} if manifest is not None else {}
    found = records.load(planned)
    units = sorted(
        (
            _unit(found[unit_id], replaced.get(ordinal, ()), former.get(unit_id), sizes)
            for unit_id, ordinal in planned.items()
        ),
        key=lambda unit: unit.ordinal,
    )
    _require_objects(storage, units, sizes)
    counts, statuses = _totals(storage, units, found.values())
    if counts["samples"] == 0:
        reasons = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        raise PermanentError(
            f"None of the {counts['inputs']} inputs gave a sample: {reasons}.",
            "Nothing is sealed; add sound pictures and run again.",
        )
    return _write(storage, units, generations, {**counts, "statuses": statuses})


def _require_committed(planned: Mapping[str, int], records: Finished) -> None:
    missing = sorted(ordinal for unit_id, ordinal in planned.items() if unit_id not in records)
    if missing:
        names = ", ".join(f"{ordinal:06d}" for ordinal in missing[:20]) + (", ..." if missing[20:] else "")
        raise IncompleteError(
            f"{len(missing)} of {len(planned)} units are not done: {names}.",
            "The same command goes on where it stopped.",
        )


def _former(storage: Storage) -> Manifest | None:
    """The manifest sealed before; None if that was not finished."""
    try:
        return read_manifest(storage)
    except UsageError:
        return None
    except VerificationError as error:
        log.info("sealing anew: %s", error)
        return None


def _is_current(
    manifest: Manifest,
    planned: Mapping[str, int],
    replaced: Mapping[int, tuple[str, ...]],
    sizes: Mapping[str, int],
) -> bool:
    return planned == {unit.unit_id: unit.ordinal for unit in manifest.units} and all(
        unit.superseded == replaced.get(unit.ordinal, ())
        and all(sizes.get(ref.path) == ref.bytes for ref in unit.objects)
        for unit in manifest.units
    )


def _sizes(storage: Storage) -> dict[str, int]:
    listings: list[list[Entry]] = in_threads(storage.list, ("shards", "samples"))
    return {entry.path: entry.size for entries in listings for entry in entries}


def _unit(
    record: Record, replaced: tuple[str, ...], former: ManifestUnit | None, sizes: Mapping[str, int]
) -> ManifestUnit:
    """A manifest row: that of the former seal while its objects are there, else the commit record's."""
    if former is not None and all(sizes.get(ref.path) == ref.bytes for ref in former.objects):
        return ManifestUnit(**{**asdict(former), "superseded": replaced})
    name = f"The commit record of unit {record['unit_id']}"
    require_keys(record, ("objects", "ordinal", "generation", "collection", "rows", "statuses", *COUNTS), name)
    refs = objects_of(name, record)
    table = next((ref for ref in refs if ref.path.startswith("samples/")), None)
    if table is None:
        raise VerificationError(f"{name} names no table.", "Remove it and run again.")
    shard = next((ref for ref in refs if ref.path.startswith("shards/")), None)
    return ManifestUnit(
        unit_id=record["unit_id"],
        ordinal=record["ordinal"],
        generation=record["generation"],
        collection=record["collection"],
        shard=shard.path if shard else None,
        shard_bytes=shard.bytes if shard else None,
        shard_sha256=shard.sha256 if shard else None,
        table=table.path,
        table_bytes=table.bytes,
        table_sha256=table.sha256,
        rows=record["rows"],
        superseded=replaced,
        **{name: record[name] for name in COUNTS},
    )


def _require_objects(storage: Storage, units: Sequence[ManifestUnit], sizes: Mapping[str, int]) -> None:
    for unit in units:
        for ref in unit.objects:
            if sizes.get(ref.path) != ref.bytes:
                raise VerificationError(
                    f"{storage.uri(ref.path)} was committed with {ref.bytes} bytes, "
                    + (f"it has {sizes[ref.path]}." if ref.path in sizes else "it is missing."),
                    f"Remove the commit record of unit {unit.unit_id} and run again to rebuild it.",
                )


def _totals(
    storage: Storage, units: Sequence[ManifestUnit], records: Iterable[Record]
) -> tuple[dict[str, int], dict[str, int]]:
    """Counts of live inputs and samples, and of each status."""
    counts = Counter({name: sum(getattr(unit, name) for unit in units) for name in COUNTS})
    statuses: Counter[str] = Counter()
    for record in records:
        statuses.update(record["statuses"])
    for unit in units:
        if unit.superseded:
            gone, samples = _replaced(storage, unit)
            counts["samples"] -= samples
            statuses.subtract(gone)
            for status, count in gone.items():
                counts[status.partition("_")[0]] -= count
                counts["inputs"] -= count
    return dict(counts), {status: count for status, count in sorted(statuses.items()) if count}


def _replaced(storage: Storage, unit: ManifestUnit) -> tuple[Counter[str], int]:
    """Superseded inputs of a unit by status, and how many samples they gave."""
    table = from_parquet(storage.read(unit.table), ["relpath", "status"])
    gone, statuses, samples = set(unit.superseded), {}, 0
    for path, status in zip(table["relpath"].to_pylist(), table["status"].to_pylist(), strict=True):
        if path in gone:
            statuses[path] = status
            samples += status == "success"
    return Counter(statuses.values()), samples


def _write(
    storage: Storage,
    units: Sequence[ManifestUnit],
    generations: Sequence[Generation],
    totals: Mapping[str, Any],
) -> Manifest:
    """Claim a version for these units, or find the version that has them."""
    table = pa.Table.from_pylist([asdict(unit) for unit in units], schema=MANIFEST)
    data = to_parquet(table)
    facts: dict[str, Any] = {
        "schema_version": layout.SCHEMA_VERSION,
        "manifest_sha256": sha256_hex(data),
        "settings": generations[0].facts["settings"],
        "generations": [
            {
                **{name: item.facts[name] for name in ("generation", "collection", "input", "units", "inputs")},
                "plan_sha256": sha256_hex(to_json(item.facts)),
            }
            for item in generations
        ],
        "units": len(units),
        "shards": sum(unit.shard is not None for unit in units),
        "bytes": sum(unit.shard_bytes or 0 for unit in units),
        **totals,
    }
    versions = [entry.path for entry in storage.list("_manifest") if entry.path.endswith(".json")]
    version = max(len(versions), 1)
    while True:
        facts["version"] = version
        if write_document(storage, manifest_path(version, "json"), facts) == facts:
            break
        version += 1
    _complete(storage, manifest_path(version, "parquet"), data)
    return _point_to_newest(storage)


def _point_to_newest(storage: Storage) -> Manifest:
    """Lead readers to the whole manifest that covers most of the plan.

    That may be another driver's, which planned more and sealed first; a slower one never takes that back.
    """
    facts = _whole(storage)
    while True:
        path = max(facts, key=lambda path: (len(facts[path]["generations"]), path))
        manifest = manifest_version(storage, path)
        former = {other: sha256_hex(to_json(values)) for other, values in facts.items() if other < path}
        pointer = {
            "version": manifest.version,
            "manifest_sha256": manifest.digest,
            "facts_sha256": sha256_hex(to_json(manifest.facts)),
            **({"former": former} if former else {}),
        }
        _complete(storage, layout.SHARD_LIST, shard_list(manifest.units))
        _complete(storage, layout.SUCCESS, to_json(pointer))
        # Whoever stores a manifest looks here after it: the last one to look has seen them all.
        before, facts = facts, _whole(storage)
        if facts.keys() == before.keys():
            return manifest


def _whole(storage: Storage) -> dict[str, dict[str, Any]]:
    """Facts of every manifest whose table is there, by path."""
    present = {entry.path for entry in storage.list("_manifest")}
    whole = sorted(path for path in present if path.removesuffix(".json") + ".parquet" in present - {path})
    return dict(zip(whole, in_threads(lambda path: read_document(storage, path), whole), strict=True))


def _complete(storage: Storage, path: str, data: bytes) -> None:
    """Store ``data`` unless it is there: a finished corpus sees no write."""
    if not storage.exists(path) or storage.read(path) != data:
        storage.publish(path, data)
