"""What has to be done: inputs, sorted and cut into units before any worker starts.

The cut depends on the inputs and the configuration alone, never on a cluster. A unit's id covers paths, sizes
and etags of its inputs, the configuration and its ordinal: a record of other work can never match it.
Appending makes a new generation of the new and the changed inputs: old units stay, ordinals go on.
Inputs that vanish keep their samples.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iqpir.config import digest
from iqpir.errors import IncompleteError, UsageError, VerificationError
from pipeline.documents import in_threads, objects_of, read_document, require_keys, write_document
from pipeline.layout import (
    INPUTS,
    SCHEMA_VERSION,
    ObjectRef,
    from_parquet,
    plan_path,
    plan_table_path,
    sha256_hex,
    to_parquet,
)
from pipeline.storage import Entry, Storage

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
"""Files that are inputs, by lower-cased suffix; whether they are pictures is found out by decoding."""

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


class Input(NamedTuple):
    """One planned file."""

    relpath: str
    size: int
    etag: str


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


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What was found at an input URL."""

    url: str
    inputs: list[Entry]
    """Sorted by path."""
    ignored: int
    """Files with other extensions."""


@dataclass(frozen=True)
class Generation:
    """One committed plan: its facts (the JSON document) and its inputs (``INPUTS``)."""

    facts: Mapping[str, Any]
    table: pa.Table

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
            columns = (rows[name].to_pylist() for name in ("relpath", "size", "etag"))
            yield ShardUnit(
                unit_id=unit_id,
                ordinal=rows["ordinal"][0].as_py(),
                generation=self.number,
                collection=self.collection,
                source=self.facts["input"],
                inputs=tuple(Input(*values) for values in zip(*columns, strict=True)),
            )

    def unit_ids(self) -> dict[str, int]:
        """Id -> ordinal."""
        return {
            self.table["unit_id"][first].as_py(): self.table["ordinal"][first].as_py() for first, _ in self._bounds()
        }

    def _bounds(self) -> list[tuple[int, int]]:
        ordinals = self.table["ordinal"].to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(ordinals)) + 1).tolist()]
        return list(zip(starts, [*starts[1:], len(ordinals)], strict=True))


def list_inputs(url: str) -> Listing:
    """Pictures below a folder or prefix.

    Raises:
        UsageError: it does not exist, or has no file with a picture's extension.
    """
    storage = Storage.open(url)
    found = storage.list()
    if not found:
        folder = storage.local("")
        if folder is not None and folder.is_file():
            raise UsageError(f"The input {url} is a file.", "Give the folder or prefix that holds the pictures.")
        what = "is empty" if folder is None or folder.is_dir() else "does not exist"
        raise UsageError(f"The input {url} {what}.", "Check --input.")
    inputs = [entry for entry in found if PurePosixPath(entry.path).suffix.lower() in EXTENSIONS]
    if not inputs:
        raise UsageError(
            f"None of the {len(found)} files below {url} has a picture's extension.",
            f"Known extensions: {', '.join(sorted(EXTENSIONS))}.",
        )
    for entry in inputs:
        if not _is_text(entry.path):
            raise UsageError(f"The file name {entry.path!a} below {url} is no UTF-8.", "Rename it.")
    return Listing(url=storage.uri(), inputs=inputs, ignored=len(found) - len(inputs))


def _absence(storage: Storage) -> str:
    folder = storage.local("")
    if folder is None:
        return "has no objects"
    if folder.is_file():
        return "is a file"
    return "is empty" if folder.is_dir() else "does not exist"


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_generations(storage: Storage) -> list[Generation]:
    """The committed plans, oldest first.

    Raises:
        VerificationError: a plan's table is missing or not what the plan says.
    """
    paths = [entry.path for entry in storage.list("_plan") if entry.path.endswith(".json")]
    return in_threads(lambda path: _read_generation(storage, path), paths)


def extend_plan(storage: Storage, listing: Listing, collection: str, settings: Mapping[str, Any]) -> list[Generation]:
    """Join the plan of a corpus, first adding a generation if there are new or changed inputs.

    Args:
        storage: the corpus.
        listing: the inputs as they are now.
        collection: what they belong to.
        settings: everything besides the inputs that decides bytes; has ``unit_bytes`` and ``unit_samples``.

    Returns:
        Every generation, oldest first.

    Raises:
        UsageError: the corpus was planned with another configuration; the message names the field.
        IncompleteError: other drivers kept planning at the same time.
    """
    for _ in range(PLAN_ATTEMPTS):
        generations = read_generations(storage)
        _require_same(generations, listing, collection, settings)
        fresh = _fresh_inputs(generations, listing, collection)
        if not fresh:
            return generations
        if _write_generation(storage, generations, fresh, listing.url, collection, settings):
            return read_generations(storage)
    raise IncompleteError(f"Other jobs keep planning {storage.url}.", "Run again when they are done.")


def make_unit_id(identity: Mapping[str, Any], ordinal: int, members: Sequence[tuple[str, int, str]]) -> str:
    """32 hex digits over everything that decides a unit's bytes.

    Args:
        identity: ``collection``, ``input`` and ``settings``.
        ordinal: of the unit.
        members: relative path, size and etag of each input.
    """
    return digest({**identity, "ordinal": ordinal, "inputs": [list(member) for member in members]}, length=32)


def superseded(generations: Sequence[Generation]) -> dict[int, tuple[str, ...]]:
    """Ordinal -> relative paths of its inputs that a later generation has again, because they changed."""
    later: dict[str, set[str]] = {}
    found: dict[int, list[str]] = {}
    for generation in reversed(generations):
        seen = later.setdefault(generation.collection, set())
        paths = generation.table["relpath"].to_pylist()
        if seen:
            for path, ordinal in zip(paths, generation.table["ordinal"].to_pylist(), strict=True):
                if path in seen:
                    found.setdefault(ordinal, []).append(path)
        if generation is not generations[0]:
            seen.update(paths)
    return {ordinal: tuple(sorted(paths)) for ordinal, paths in found.items()}


def _read_generation(storage: Storage, path: str) -> Generation:
    facts = read_document(storage, path)
    require_keys(facts, PLAN_KEYS, storage.uri(path))
    refs = objects_of(storage.uri(path), facts)
    if len(refs) != 1:
        raise VerificationError(f"{storage.uri(path)} does not name one table.")
    ref = refs[0]
    try:
        data = storage.read(ref.path)
    except FileNotFoundError as error:
        raise VerificationError(f"The plan's table {storage.uri(ref.path)} is missing.") from error
    if sha256_hex(data) != ref.sha256:
        raise VerificationError(f"The plan's table {storage.uri(ref.path)} is not what {path} says.")
    return Generation(facts, from_parquet(data))


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


def _fresh_inputs(generations: Sequence[Generation], listing: Listing, collection: str) -> list[Entry]:
    """Inputs not planned yet, or not with this size and etag (by columns: there may be millions)."""
    paths = pa.array([entry.path for entry in listing.inputs], pa.string())
    sizes = pa.array([entry.size for entry in listing.inputs], pa.int64())
    etags = pa.array([entry.etag for entry in listing.inputs], pa.string())
    planned = np.zeros(len(listing.inputs), dtype=bool)
    for generation in generations:
        if generation.collection != collection:
            continue
        table = generation.table
        rows = pc.index_in(paths, value_set=table["relpath"].combine_chunks())
        known = pc.is_valid(rows).to_numpy(zero_copy_only=False)
        rows = pc.fill_null(rows, 0)
        same_size = pc.equal(sizes, table["size"].take(rows)).to_numpy()
        same_etag = pc.equal(etags, table["etag"].take(rows)).to_numpy()
        planned = np.where(known, same_size & same_etag, planned)
    return [entry for entry, done in zip(listing.inputs, planned.tolist(), strict=True) if not done]


def _write_generation(
    storage: Storage,
    generations: Sequence[Generation],
    inputs: Sequence[Entry],
    url: str,
    collection: str,
    settings: Mapping[str, Any],
) -> bool:
    """Commit one more plan; False if another driver's plan took its number."""
    number = len(generations) + 1
    ordinal = generations[-1].facts["first_ordinal"] + generations[-1].facts["units"] if generations else 0
    units = _cut(inputs, settings["unit_bytes"], settings["unit_samples"])
    table = _table(inputs, units, ordinal, {"collection": collection, "input": url, "settings": settings})
    data = to_parquet(table)
    sha256 = sha256_hex(data)
    path = plan_table_path(number, sha256)
    ref = ObjectRef(path=path, bytes=len(data), sha256=sha256, rows=table.num_rows)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "generation": number,
        "collection": collection,
        "input": url,
        "settings": json.loads(json.dumps(settings)),
        "settings_digest": digest(settings),
        "first_ordinal": ordinal,
        "units": len(units),
        "inputs": len(inputs),
        "bytes": sum(entry.size for entry in inputs),
        "objects": [ref.to_dict()],
    }
    storage.publish(path, data)
    return write_document(storage, plan_path(number), facts) == facts


def _cut(inputs: Sequence[Entry], unit_bytes: int, unit_samples: int) -> list[int]:
    """How many neighbouring inputs each unit takes."""
    counts, size = [0], 0
    for entry in inputs:
        if counts[-1] and (size + entry.size > unit_bytes or counts[-1] >= unit_samples):
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += entry.size
    return counts


def _table(inputs: Sequence[Entry], units: Sequence[int], first_ordinal: int, identity: Mapping[str, Any]) -> pa.Table:
    unit_ids: list[str] = []
    start = 0
    for ordinal, count in enumerate(units, first_ordinal):
        members = [(entry.path, entry.size, entry.etag) for entry in inputs[start : start + count]]
        unit_ids.append(make_unit_id(identity, ordinal, members))
        start += count
    columns = {
        "unit_id": np.repeat(np.array(unit_ids, dtype=object), units),
        "ordinal": np.repeat(np.arange(first_ordinal, first_ordinal + len(units), dtype=np.int32), units),
        "relpath": [entry.path for entry in inputs],
        "size": [entry.size for entry in inputs],
        "etag": [entry.etag for entry in inputs],
    }
    return pa.table(columns, schema=INPUTS)
