"""The sealed manifest: the ordered list of a corpus's objects, sizes, digests and counts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import pyarrow as pa

from iqpir.errors import UsageError, VerificationError
from pipeline import layout
from pipeline.documents import read_as_written, require_keys
from pipeline.layout import ObjectRef, from_parquet, sha256_hex, to_json
from pipeline.storage import Storage

POINTER = ("version", "manifest_sha256", "facts_sha256", "former")
"""Keys of ``_SUCCESS``; the last, from the second seal on: path -> sha256 of the facts of every earlier manifest."""


@dataclass(frozen=True, kw_only=True)
class ManifestUnit:
    """One row of a manifest: a unit's objects and counts (as committed, superseded inputs included)."""

    unit_id: str
    ordinal: int
    generation: int
    collection: str
    shard: str | None
    """Path of the tar; None where no input gave a sample."""
    shard_bytes: int | None
    shard_sha256: str | None
    table: str
    """Path of the unit's sample rows."""
    table_bytes: int
    table_sha256: str
    rows: int
    inputs: int
    success: int
    """Inputs that gave at least one sample."""
    rejected: int
    failed: int
    samples: int
    """Members of the shard, counted as samples."""
    superseded: tuple[str, ...] = ()
    """Relative paths of inputs that changed: a later unit has their samples, readers skip these."""

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        """The shard, if any, and the table."""
        table = ObjectRef(path=self.table, bytes=self.table_bytes, sha256=self.table_sha256, rows=self.rows)
        if self.shard is None or self.shard_bytes is None or self.shard_sha256 is None:
            return (table,)
        return (ObjectRef(path=self.shard, bytes=self.shard_bytes, sha256=self.shard_sha256), table)


@dataclass(frozen=True)
class Manifest:
    """A sealed manifest.

    Attributes:
        digest: sha256 of its Parquet bytes: the identity of the corpus.
        facts: the JSON beside it: version, generations, settings, totals.
        units: every unit, by ordinal.
    """

    digest: str
    facts: Mapping[str, Any]
    units: tuple[ManifestUnit, ...]

    @property
    def version(self) -> int:
        """From 1; a seal after an append adds one."""
        return int(self.facts["version"])

    @property
    def samples(self) -> int:
        """Samples that readers see."""
        return int(self.facts["samples"])

    def object(self, path: str) -> ObjectRef:
        """Size and sha256 of a shard or a table. Raises ``KeyError`` for any other path."""
        return self._objects[path]

    @cached_property
    def _objects(self) -> dict[str, ObjectRef]:
        return {ref.path: ref for unit in self.units for ref in unit.objects}


def read_manifest(storage: Storage) -> Manifest:
    """The manifest that ``_SUCCESS`` points to.

    Raises:
        UsageError: nothing is sealed here.
        VerificationError: the three files contradict each other.
    """
    try:
        pointer = read_as_written(storage, layout.SUCCESS)
    except FileNotFoundError as error:
        if storage.list("_manifest"):
            raise VerificationError(
                f"{storage.url} has a manifest and no {layout.SUCCESS}.",
                "Run jobs/shard.py again to seal it.",
            ) from error
        raise UsageError(
            f"There is no sealed corpus at {storage.url}.",
            "jobs/shard.py makes one; jobs/status.py says what is missing.",
        ) from error
    require_keys(pointer, POINTER[:3], storage.uri(layout.SUCCESS))
    path = layout.manifest_path(int(pointer["version"]), "json")
    manifest = manifest_version(storage, path)
    if pointer["manifest_sha256"] != manifest.digest:
        raise differs(storage, layout.manifest_path(pointer["version"], "parquet"))
    if pointer["facts_sha256"] != sha256_hex(to_json(manifest.facts)) or not pointer.keys() <= set(POINTER):
        raise differs(storage, path)
    return manifest


def manifest_version(storage: Storage, path: str) -> Manifest:
    """The manifest whose facts are at ``path``, checked against the digest in them.

    Raises:
        UsageError: a later version of this program wrote it.
        VerificationError: a file is missing or differs.
    """
    table = path.removesuffix(".json") + ".parquet"
    try:
        facts = read_as_written(storage, path)
        data = storage.read(table)
    except FileNotFoundError as error:
        raise VerificationError(f"The manifest of {storage.url} is not whole: {error}.") from error
    require_keys(facts, ("schema_version", "version", "manifest_sha256", "samples"), storage.uri(path))
    if facts["schema_version"] > layout.SCHEMA_VERSION:
        raise UsageError(
            f"{storage.url} has schema version {facts['schema_version']}, this program reads up to "
            f"{layout.SCHEMA_VERSION}.",
            "Install a newer version.",
        )
    if facts["manifest_sha256"] != sha256_hex(data):
        raise differs(storage, table)
    return Manifest(facts["manifest_sha256"], facts, tuple(units_of(from_parquet(data))))


def units_of(table: pa.Table) -> Iterable[ManifestUnit]:
    """Rows of a ``MANIFEST`` table as objects."""
    names = [field.name for field in fields(ManifestUnit)]
    for row in table.select(names).to_pylist():
        yield ManifestUnit(**{**row, "superseded": tuple(row["superseded"])})


def shard_list(units: Iterable[ManifestUnit]) -> bytes:
    """What ``shards.txt`` holds for these units: the path of each shard, for readers that know no manifest."""
    return "".join(f"{unit.shard}\n" for unit in units if unit.shard is not None).encode()


def differs(storage: Storage, what: str) -> VerificationError:
    """The error for an object whose bytes are not those of the manifest."""
    return VerificationError(
        f"{storage.uri(what)} is not what the manifest says (sha256 differs).",
        "Run jobs/verify.py; remove the unit's commit record and run jobs/shard.py again to rebuild it.",
    )
