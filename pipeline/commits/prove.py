"""Prove one unit, or one table beside it: bytes, rows, keys, offsets, as its records say. Lies are values."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.commits.manifest import ManifestUnit
from pipeline.corpus import Corpus
from pipeline.layout import SAMPLES, ObjectRef, from_parquet, sha256_hex
from pipeline.sharding.tar import Member, TarError, read_members
from pipeline.storage import Storage

Rows = list[dict[str, Any]]
Keys = NDArray[np.bytes_]


@dataclass(frozen=True)
class Claim:
    """What is to be proved: a unit (no ``sidecar``), or a table that has rows for a unit's samples."""

    unit: ManifestUnit
    inputs_digest: str = ""
    """``relpaths_digest`` of the unit's planned inputs."""
    sidecar: ObjectRef | None = None


@dataclass(frozen=True)
class Proof:
    """What was found."""

    lies: tuple[str, ...]
    keys: Keys = field(default_factory=lambda: as_keys(()))
    """Keys of the unit's live samples."""


@dataclass(frozen=True)
class Prover:
    """Proves claims about one corpus; travels to the workers."""

    storage: Storage

    def __call__(self, claim: Claim) -> Proof:
        """The lies in the objects of ``claim``; empty if it holds."""
        if claim.sidecar is not None:
            return Proof(tuple(self._sidecar(claim.unit, claim.sidecar)))
        unit = claim.unit
        try:
            data = self.storage.read(unit.table)
        except FileNotFoundError:
            return Proof((f"{unit.table}: is missing",))
        if sha256_hex(data) != unit.table_sha256:
            return Proof((f"{unit.table}: its sha256 differs from the manifest's",))
        table = from_parquet(data)
        if not table.schema.equals(SAMPLES):
            return Proof((f"{unit.table}: has other columns than a sample table",))
        rows = table.to_pylist()
        gone = set(unit.superseded)
        keys = [row["key"] for row in rows if row["status"] == "success" and row["relpath"] not in gone]
        return Proof((*self._table(claim, rows), *self._shard(unit, rows)), as_keys(keys))

    def _table(self, claim: Claim, rows: Rows) -> Iterator[str]:
        unit = claim.unit
        statuses = {row["relpath"]: row["status"].partition("_")[0] for row in rows}
        counts = Counter(statuses.values())
        found = {name: counts[name] for name in ("success", "rejected", "failed")}
        found |= {"inputs": len(statuses), "rows": len(rows)}
        found["samples"] = sum(row["status"] == "success" for row in rows)
        for name, count in found.items():
            if count != getattr(unit, name):
                yield f"{unit.table}: has {count} {name}, its record says {getattr(unit, name)}"
        if relpaths_digest(list(statuses)) != claim.inputs_digest:
            yield f"{unit.table}: its inputs are not those that were planned"
        if len({row["key"] for row in rows}) != len(rows):
            yield f"{unit.table}: has a key twice"
        if any(row["status"] == "success" and row["shard"] != unit.shard for row in rows):
            yield f"{unit.table}: names another shard than the manifest"

    def _shard(self, unit: ManifestUnit, rows: Rows) -> Iterator[str]:
        if unit.shard is None:
            return
        try:
            with self._opened(unit.shard) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != unit.shard_sha256:
                    yield f"{unit.shard}: its sha256 differs from the manifest's"
                    return
                file.seek(0)
                members = list(read_members(file))
        except (TarError, FileNotFoundError) as error:
            yield f"{unit.shard}: {_first_line(error)}"
            return
        sound = [row for row in rows if row["status"] == "success"]
        expected = [Member(row["member"], row["byte_offset"], row["byte_size"], row["sha256"]) for row in sound]
        names = [f"{row['key']}.json" for row in sound]
        if members[::2] != expected or [member.name for member in members[1::2]] != names:
            yield f"{unit.shard}: its members are not those of {unit.table}"

    def _sidecar(self, unit: ManifestUnit, ref: ObjectRef) -> Iterator[str]:
        try:
            data = self.storage.read(ref.path)
        except FileNotFoundError:
            yield f"{ref.path}: is missing"
            return
        if sha256_hex(data) != ref.sha256:
            yield f"{ref.path}: its sha256 differs from its record's"
            return
        table = from_parquet(data)
        if ref.rows is not None and table.num_rows != ref.rows:
            yield f"{ref.path}: has {table.num_rows} rows, its record says {ref.rows}"
        if "key" not in table.column_names:
            yield f"{ref.path}: has no column key"
            return
        keys = table["key"].to_pylist()
        if len(set(keys)) != len(keys):
            yield f"{ref.path}: has a key twice"
        live = Corpus(self.storage).unit_samples(unit, ["key"])["key"].to_pylist()
        missing = set(live) - set(keys)
        if missing:
            yield f"{ref.path}: has no row for {len(missing)} samples of unit {unit.ordinal:06d}"

    @contextmanager
    def _opened(self, path: str) -> Iterator[BufferedReader]:
        local = self.storage.local(path)
        if local is not None:
            with local.open("rb") as file:
                yield file
            return
        with tempfile.TemporaryDirectory(prefix="iqpir-verify-") as folder:
            copy = Path(folder) / "object"
            self.storage.download(path, copy)
            with copy.open("rb") as file:
                yield file


def as_keys(keys: Iterable[str]) -> Keys:
    """Keys without an object each: those of a whole corpus are held at once."""
    return np.array([str(key).encode() for key in keys], np.bytes_)


def relpaths_digest(paths: list[str]) -> str:
    """sha256 of a set of paths."""
    return sha256_hex("\0".join(sorted(paths)).encode())


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
