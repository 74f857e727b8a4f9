"""What has to be done: inputs, sorted and cut into units before any worker starts.

The cut depends on the inputs and the configuration alone, never on a cluster. A unit's id covers paths, sizes
and etags of its inputs, the configuration and its ordinal: a record of other work can never match it.
Appending makes a new generation of the new and the changed inputs: old units stay, ordinals go on.
Inputs that vanish keep their samples, unless a pruning generation names them as removed.
"""

import json
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iqpir.config import digest
from iqpir.errors import IncompleteError, UsageError, VerificationError
from pipeline.documents import (
    in_threads,
    objects_of,
    publish_table,
    read_document,
    require_keys,
    write_document,
)
from pipeline.layout import (
    DETAILED_INPUTS,
    INPUTS,
    REMOVED,
    SCHEMA_VERSION,
    from_parquet,
    plan_path,
    plan_table_path,
    sha256_hex,
)
from pipeline.sources.inputs import Input, Listing
from pipeline.storage import Storage

UNKNOWN_BYTES = 1 << 18
"""What an input counts whose size nobody knows before its unit is worked on."""
PLAN_ATTEMPTS = 5
PLAN_KEYS = frozenset(
    [
        "generation",
        "collection",
        "input",
        "settings",
        "settings_digest",
        "first_ordinal",
        "units",
        "inputs",
        "bytes",
        "objects",
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardUnit:
    """A planned unit: what becomes one shard and one table of rows."""

    unit_id: str
    ordinal: int
    generation: int
    collection: str
    source: str
    """URL that the inputs' paths are relative to."""
    inputs: tuple[Input, ...]
    reading: Mapping[str, Any] = field(default_factory=dict)
    """How the inputs are read (``Listing.reading``); empty for a folder of pictures."""


@dataclass(frozen=True)
class Generation:
    """One committed plan: its facts (the JSON document) and its inputs (``INPUTS``)."""

    facts: Mapping[str, Any]
    table: pa.Table
    removed: pa.Table = field(default_factory=REMOVED.empty_table)
    """Inputs of earlier generations that are gone from the source (``REMOVED``)."""

    @property
    def number(self) -> int:
        """From 1."""
        return int(self.facts["generation"])

    @property
    def collection(self) -> str:
        """What its inputs belong to."""
        return str(self.facts["collection"])

    def units(self, skip: Container[str] = ()) -> Iterator[ShardUnit]:
        """Its units, by ordinal; those whose id is in ``skip`` are left out, at no cost."""
        for first, last in self._bounds():
            unit_id = self.table["unit_id"][first].as_py()
            if unit_id in skip:
                continue
            rows = self.table.slice(first, last - first)
            columns = (rows[name].to_pylist() for name in Input._fields if name in rows.column_names)
            yield ShardUnit(
                unit_id=unit_id,
                ordinal=rows["ordinal"][0].as_py(),
                generation=self.number,
                collection=self.collection,
                source=self.facts["input"],
                inputs=tuple(Input(*values) for values in zip(*columns, strict=True)),
                reading=self.facts.get("source", {}),
            )

    def unit_ids(self) -> dict[str, int]:
        """Id -> ordinal."""
        return {
            self.table["unit_id"][first].as_py(): self.table["ordinal"][first].as_py() for first, _ in self._bounds()
        }

    def _bounds(self) -> list[tuple[int, int]]:
        ordinals = self.table["ordinal"].to_numpy()
        if not len(ordinals):
            return []
        starts = [0, *(np.flatnonzero(np.diff(ordinals)) + 1).tolist()]
        return list(zip(starts, [*starts[1:], len(ordinals)], strict=True))


def read_generations(storage: Storage) -> list[Generation]:
    """The committed plans, oldest first.

    Raises:
        VerificationError: a plan's table is missing or not what the plan says.
    """
    paths = [entry.path for entry in storage.list("_plan") if entry.path.endswith(".json")]
    return in_threads(lambda path: _read_generation(storage, path), paths)


def extend_plan(
    storage: Storage,
    listing: Listing,
    collection: str,
    settings: Mapping[str, Any],
    prune: bool = False,
    again: Collection[str] = (),
) -> list[Generation]:
    """Join the plan of a corpus, first adding a generation if there are new, changed or removed inputs.

    Args:
        storage: the corpus.
        listing: the inputs as they are now.
        collection: what they belong to.
        settings: everything besides the inputs that decides bytes; has ``unit_bytes`` and ``unit_samples``.
        prune: whether planned inputs that are not in ``listing`` count as removed; it has to be a whole one then.
        again: relative paths of inputs that are planned again even where they are as they were.

    Returns:
        Every generation, oldest first.

    Raises:
        UsageError: the corpus was planned with another configuration; the message names the field.
        IncompleteError: other drivers kept planning at the same time.
    """
    for _ in range(PLAN_ATTEMPTS):
        generations = read_generations(storage)
        _require_same(generations, listing, collection, settings)
        fresh = _fresh_inputs(generations, listing, collection, again)
        removed = _removed_inputs(generations, listing, collection) if prune else REMOVED.empty_table()
        if not fresh.num_rows and not removed.num_rows:
            return generations
        if _write_generation(storage, generations, fresh, removed, listing, collection, settings):
            return read_generations(storage)
    raise IncompleteError(f"Other jobs keep planning {storage.url}.", "Run again when they are done.")


def planned_containers(
    generations: Sequence[Generation], collection: str, url: str, reading: Mapping[str, Any]
) -> dict[str, str]:
    """Etags that tars or Parquet files had when they were planned last, by path.

    Args:
        generations: the plan.
        collection: whose inputs count.
        url: the folder they are in.
        reading: how they are read.
    """
    found: dict[str, str] = {}
    for generation in generations:
        if (generation.collection, generation.facts["input"]) != (collection, url):
            continue
        for path in _containers(generation.removed["relpath"]).unique().to_pylist():
            found.pop(path, None)
        if generation.facts.get("source", {}) == reading:
            table = pa.table({"path": _containers(generation.table["relpath"]), "etag": generation.table["etag"]})
            for row in table.group_by(["path", "etag"], use_threads=False).aggregate([]).to_pylist():
                found[row["path"]] = row["etag"]
    return found


def identity_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plan's facts that the ids of its units cover."""
    return {name: facts[name] for name in ("collection", "input", "settings", "source") if name in facts}


def make_unit_id(identity: Mapping[str, Any], ordinal: int, members: Sequence[Input]) -> str:
    """32 hex digits over everything that decides a unit's bytes.

    Args:
        identity: ``identity_of`` the plan.
        ordinal: of the unit.
        members: its inputs.
    """
    inputs = [list(member) if member.detail else list(member[:3]) for member in members]
    return digest({**identity, "ordinal": ordinal, "inputs": inputs}, length=32)


def superseded(generations: Sequence[Generation]) -> dict[int, tuple[str, ...]]:
    """Ordinal -> relative paths of its inputs that a later generation has again, because they changed, or removes."""
    later: dict[str, pa.Array] = {}
    found: dict[int, list[str]] = {}
    for generation in reversed(generations):
        seen = later.get(generation.collection, pa.array([], pa.string()))
        if len(seen):
            rows = generation.table.filter(pc.is_in(generation.table["relpath"], value_set=seen))
            for path, ordinal in zip(rows["relpath"].to_pylist(), rows["ordinal"].to_pylist(), strict=True):
                found.setdefault(ordinal, []).append(path)
        if generation is not generations[0]:
            paths = (table["relpath"].combine_chunks() for table in (generation.table, generation.removed))
            later[generation.collection] = pa.concat_arrays([seen, *paths])
    return {ordinal: tuple(sorted(paths)) for ordinal, paths in found.items()}


def _read_generation(storage: Storage, path: str) -> Generation:
    facts = read_document(storage, path)
    require_keys(facts, PLAN_KEYS, storage.uri(path))
    refs = objects_of(storage.uri(path), facts)
    if len(refs) not in (1, 2):
        raise VerificationError(f"{storage.uri(path)} does not name one table, or two.")
    tables = []
    for ref in refs:
        try:
            data = storage.read(ref.path)
        except FileNotFoundError as error:
            raise VerificationError(f"The plan's table {storage.uri(ref.path)} is missing.") from error
        if sha256_hex(data) != ref.sha256:
            raise VerificationError(f"The plan's table {storage.uri(ref.path)} is not what {path} says.")
        tables.append(from_parquet(data))
    return Generation(facts, *tables)


def _require_same(
    generations: Sequence[Generation], listing: Listing, collection: str, settings: Mapping[str, Any]
) -> None:
    for generation in generations:
        planned = dict(_flat(generation.facts["settings"]))
        wanted = dict(_flat(settings))
        if generation.collection == collection:
            planned["input"], wanted["input"] = generation.facts["input"], listing.url
        for name in sorted(planned.keys() | wanted.keys()):
            if planned.get(name) != wanted.get(name):
                raise UsageError(
                    f"The corpus was planned with {name} = {planned.get(name)!r}, now it is {wanted.get(name)!r}.",
                    "Use the same value, or another corpus (for another input: another collection).",
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fresh_inputs(
    generations: Sequence[Generation], listing: Listing, collection: str, again: Collection[str]
) -> pa.Table:
    """Inputs not planned yet, not with this size and etag, or wanted again (by columns: there may be millions)."""
    found = listing.table
    paths = found["relpath"].combine_chunks()
    planned = np.zeros(found.num_rows, dtype=bool)
    for generation in generations:
        if generation.collection != collection:
            continue
        table = generation.table
        rows = pc.index_in(paths, value_set=table["relpath"].combine_chunks())
        known = pc.is_valid(rows).to_numpy(zero_copy_only=False)
        rows = pc.fill_null(rows, 0)
        if table.num_rows:
            same_size = pc.equal(found["size"], table["size"].take(rows)).to_numpy()
            same_etag = pc.equal(found["etag"], table["etag"].take(rows)).to_numpy()
            planned = np.where(known, same_size & same_etag, planned)
        if generation.removed.num_rows:
            gone = pc.is_in(paths, value_set=generation.removed["relpath"].combine_chunks())
            planned &= ~gone.to_numpy(zero_copy_only=False)
    if again:
        wanted = pc.is_in(paths, value_set=pa.array(again, pa.string()))
        planned &= ~wanted.to_numpy(zero_copy_only=False)
    return found.filter(pa.array(~planned))


def _removed_inputs(generations: Sequence[Generation], listing: Listing, collection: str) -> pa.Table:
    """Live inputs of a collection that are not listed."""
    live = pa.array([], pa.string())
    for generation in generations:
        if generation.collection == collection:
            gone = generation.removed["relpath"].combine_chunks()
            live = live.filter(pc.invert(pc.is_in(live, value_set=gone)))
            live = pa.concat_arrays([live, generation.table["relpath"].combine_chunks()]).unique()
    listed = pc.is_in(live, value_set=listing.table["relpath"].combine_chunks())
    return pa.table({"relpath": live.filter(pc.invert(listed))}, schema=REMOVED).sort_by("relpath")


def _containers(paths: pa.Array) -> pa.Array:
    """Paths of the files that inputs are in: without the fragment of a member or row."""
    return pc.replace_substring_regex(paths, r"#(member=|row_group=\d+&row=\d+$).*", "")


def _write_generation(
    storage: Storage,
    generations: Sequence[Generation],
    inputs: pa.Table,
    removed: pa.Table,
    listing: Listing,
    collection: str,
    settings: Mapping[str, Any],
) -> bool:
    """Commit one more plan; False if another driver's plan took its number."""
    number = len(generations) + 1
    ordinal = generations[-1].facts["first_ordinal"] + generations[-1].facts["units"] if generations else 0
    units = _cut(inputs, settings["unit_bytes"], settings["unit_samples"])
    source = {"source": dict(listing.reading)} if listing.reading else {}
    identity = {"collection": collection, "input": listing.url, "settings": settings, **source}
    table = _table(inputs, units, ordinal, identity)
    tables = [table, removed] if removed.num_rows else [table]
    refs = [publish_table(storage, each, lambda sha256: plan_table_path(number, sha256)) for each in tables]
    facts = {
        "schema_version": SCHEMA_VERSION,
        "generation": number,
        **identity,
        "settings": json.loads(json.dumps(settings)),
        "settings_digest": digest(settings),
        "first_ordinal": ordinal,
        "units": len(units),
        "inputs": inputs.num_rows,
        "bytes": pc.sum(inputs["size"]).as_py() or 0,
        "objects": [ref.to_dict() for ref in refs],
    }
    return write_document(storage, plan_path(number), facts) == facts


def _cut(inputs: pa.Table, unit_bytes: int, unit_samples: int) -> list[int]:
    """How many neighbouring inputs each unit takes."""
    unknown = pc.equal(inputs["etag"], "").to_numpy()
    weights = np.where(unknown, UNKNOWN_BYTES, inputs["size"].to_numpy())
    counts: list[int] = []
    size = 0
    for weight in weights.tolist():
        if not counts or size + weight > unit_bytes or counts[-1] >= unit_samples:
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += weight
    return counts


def _table(inputs: pa.Table, units: Sequence[int], first_ordinal: int, identity: Mapping[str, Any]) -> pa.Table:
    unit_ids: list[str] = []
    start = 0
    for ordinal, count in enumerate(units, first_ordinal):
        values = (inputs[name].slice(start, count).to_pylist() for name in inputs.column_names)
        unit_ids.append(make_unit_id(identity, ordinal, [Input(*each) for each in zip(*values, strict=True)]))
        start += count
    columns = {
        "unit_id": pa.array(np.repeat(np.array(unit_ids, dtype=object), units), pa.string()),
        "ordinal": np.repeat(np.arange(first_ordinal, first_ordinal + len(units), dtype=np.int32), units),
        **{name: inputs[name] for name in inputs.column_names},
    }
    return pa.table(columns, schema=DETAILED_INPUTS if "detail" in inputs.column_names else INPUTS)
