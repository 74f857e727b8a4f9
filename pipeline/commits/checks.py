"""What ``verify`` compares without reading payload: plans, records, totals, sizes, views. Lies are values."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from iqpir.config import digest
from pipeline import layout
from pipeline.commits.manifest import Manifest, manifest_version, shard_list
from pipeline.commits.plan import Generation, identity_of, make_unit_id, superseded
from pipeline.commits.references import Reference
from pipeline.layout import commit_name, commit_prefix, sha256_hex, to_json
from pipeline.storage import Entry, Storage

Documents = Mapping[str, Mapping[str, Any]]

_RECORDED = (
    "ordinal",
    "generation",
    "collection",
    "rows",
    "inputs",
    "success",
    "rejected",
    "failed",
    "samples",
)


def plan_lies(generations: Sequence[Generation]) -> Iterator[str]:
    """Plans whose facts do not fit their tables, or whose unit ids do not cover both."""
    ordinal = 0
    for generation in generations:
        facts, path = generation.facts, layout.plan_path(generation.number)
        sizes = generation.table["size"]
        found = {
            "units": len(generation.unit_ids()),
            "inputs": len(sizes),
            "bytes": pc.sum(sizes).as_py() or 0,
            "first_ordinal": ordinal,
            "settings_digest": digest(facts["settings"]),
        }
        for name, value in found.items():
            if facts[name] != value:
                yield f"{path}: {name} is {facts[name]}, its table makes it {value}"
        identity = identity_of(facts)
        for unit in generation.units():  # one at a time: inputs as objects take four times the room of the table
            if unit.unit_id != make_unit_id(identity, unit.ordinal, unit.inputs):
                yield f"{path}: the id of unit {unit.ordinal:06d} is not that of its inputs and settings"
        ordinal += len(generation.unit_ids())


def manifest_lies(manifest: Manifest, generations: Sequence[Generation]) -> Iterator[str]:
    """A manifest that has other units than planned, or totals that its units do not add up to."""
    name, facts = layout.manifest_path(manifest.version, "json"), manifest.facts
    sealed = generations[: len(facts["generations"])]
    planned = {unit_id: ordinal for item in sealed for unit_id, ordinal in item.unit_ids().items()}
    if planned != {unit.unit_id: unit.ordinal for unit in manifest.units}:
        yield f"{name}: its units are not those that were planned"
    for item, generation in zip(facts["generations"], generations, strict=False):
        if item["plan_sha256"] != sha256_hex(to_json(generation.facts)):
            yield f"{layout.plan_path(generation.number)}: its sha256 differs from the manifest's"
    replaced = superseded(sealed)
    for unit in manifest.units:
        if unit.inputs != unit.success + unit.rejected + unit.failed:
            yield f"{name}: unit {unit.ordinal:06d} does not account for each of its inputs"
        if unit.superseded != replaced.get(unit.ordinal, ()):
            yield f"{name}: unit {unit.ordinal:06d} hides other inputs than those planned again"
    live = sum(unit.inputs - len(unit.superseded) for unit in manifest.units)
    if not facts["inputs"] == live == facts["success"] + facts["rejected"] + facts["failed"]:
        yield f"{name}: {facts['inputs']} inputs, and {live} are accounted for"


def former_lies(pointer: Mapping[str, Any], manifests: Mapping[str, Manifest]) -> Iterator[str]:
    """Manifests of earlier seals that are not what ``_SUCCESS`` says."""
    for path, sha256 in pointer.get("former", {}).items():
        if path not in manifests:
            yield f"{path}: is missing, or its table is"
        elif sha256_hex(to_json(manifests[path].facts)) != sha256:
            yield f"{path}: its sha256 differs from that of {layout.SUCCESS}"


def record_lies(documents: Documents, manifest: Manifest) -> Iterator[str]:
    """Commit records that are not where they say, not in the one form, or not what the manifest has."""
    units = {unit.unit_id: unit for unit in manifest.units}
    attempts: dict[str, list[tuple[str, list[str]]]] = {}
    for path, values in documents.items():
        if not path.startswith("_commits/"):
            continue
        unit_id, step = values.get("unit_id"), values.get("step")
        name = commit_name(str(unit_id), int(values.get("retry", 0)))
        place = f"{commit_prefix(str(step), str(values.get('fingerprint')))}/{name}"
        if path != f"{place}.json" and path != f"{place}/{sha256_hex(to_json(values))[:12]}.json":
            yield f"{path}: is the record of another step or unit"
        unit = units.get(str(unit_id))
        if step == "shard" and unit is not None:
            different = [name for name in _RECORDED if values.get(name) != getattr(unit, name)]
            attempts.setdefault(unit.unit_id, []).append((path, different))
    for found in attempts.values():
        if all(different for _, different in found):  # one of them counts, where a store keeps several
            path, different = found[0]
            yield f"{path}: {', '.join(different)} differ from the manifest"


def document_lies(storage: Storage, documents: Documents, manifest: Manifest, present: set[str]) -> Iterator[str]:
    """A list of shards that is not the manifest's, and views whose rows have another digest."""
    if not _lists_shards(storage, manifest, present):
        yield f"{layout.SHARD_LIST}: is not the list of the manifest's shards"
    for path, values in documents.items():
        if path.startswith("views/"):
            table = path.removesuffix(".json") + ".parquet"
            if table not in present:
                yield f"{table}: is missing"
            elif not values.get("digest") or not sha256_hex(storage.read(table)).startswith(values["digest"]):
                yield f"{table}: its digest differs from that of {path}"


def _lists_shards(storage: Storage, manifest: Manifest, present: set[str]) -> bool:
    """Whether ``shards.txt`` is that of ``manifest``, or of the next one: a seal may have been interrupted."""
    if layout.SHARD_LIST not in present:
        return False
    listed = storage.read(layout.SHARD_LIST)
    if listed == shard_list(manifest.units):
        return True
    later = sorted(path for path in present if path > layout.manifest_path(manifest.version, "parquet"))
    tables = [path for path in later if path.startswith("_manifest/") and path.endswith(".parquet")]
    return any(
        listed == shard_list(manifest_version(storage, path.removesuffix(".parquet") + ".json").units)
        for path in tables
    )


def reference_lies(named: Sequence[Reference], entries: Sequence[Entry]) -> Iterator[str]:
    """Objects that are missing, of another size, or named with two different digests."""
    sizes = {entry.path: entry.size for entry in entries}
    first: dict[str, Reference] = {}
    for item in sorted(named, key=lambda item: (item.ref.path, item.document)):
        path = item.ref.path
        if path not in sizes:
            yield f"{path}: is missing, {item.document} names it"
        elif sizes[path] != item.ref.bytes:
            yield f"{path}: has {sizes[path]} bytes, {item.document} says {item.ref.bytes}"
        other = first.setdefault(path, item)
        if other.ref.sha256 != item.ref.sha256:
            yield f"{path}: {other.document} and {item.document} name different digests"
