"""Read and write the documents, tables and files of a corpus, many at a time."""

import json
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from iqpir.config import digest
from iqpir.errors import VerificationError
from pipeline.layout import SCHEMA_VERSION, ObjectRef, sha256_hex, to_json, to_parquet
from pipeline.storage import Storage

T = TypeVar("T")
R = TypeVar("R")

READ_THREADS = 16
STAMP = ("schema_version", "document_digest")
"""Keys of a document's own digest: two, so that a flipped bit in one of them does not pass for an older document."""


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results of ``function`` in the order of ``items``; for calls that wait for a store."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(function, items))


def read_document(storage: Storage, path: str) -> dict[str, Any]:
    """A JSON document.

    Raises:
        FileNotFoundError: there is none.
        VerificationError: it is no JSON object.
    """
    return _parsed(storage, path, storage.read(path))


def _parsed(storage: Storage, path: str, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise VerificationError(f"{storage.uri(path)} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise VerificationError(f"{storage.uri(path)} is no JSON object.")
    return values


def read_as_written(storage: Storage, path: str) -> dict[str, Any]:
    """A JSON document in the one form of ``to_json``: a flipped byte cannot hide in a space or a number's form.

    Raises:
        FileNotFoundError: there is none.
        VerificationError: it is no JSON object, or in another form.
    """
    data = storage.read(path)
    values = _parsed(storage, path, data)
    if to_json(values) != data:
        raise VerificationError(f"{storage.uri(path)} is not in the form that documents are written in.", "Restore it.")
    return values


def stamped(values: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its own digest (32 hex digits over everything else in it)."""
    content = {**unstamped(values), "schema_version": SCHEMA_VERSION}
    return {**content, "document_digest": digest(content, 32)}


def unstamped(values: Mapping[str, Any]) -> dict[str, Any]:
    """A document without its own digest."""
    return {name: value for name, value in values.items() if name not in STAMP}


def is_as_stamped(values: Mapping[str, Any]) -> bool:
    """Whether a document is what its own digest says; True for one from before documents had a digest."""
    content = {name: value for name, value in values.items() if name != "document_digest"}
    return values.keys().isdisjoint(STAMP) or values.get("document_digest") == digest(content, 32)


def require_keys(values: Mapping[str, Any], names: Iterable[str], path: str) -> None:
    """Check that a document has these keys.

    Raises:
        VerificationError: one is missing.
    """
    missing = sorted(set(names) - values.keys())
    if missing:
        raise VerificationError(f"{path} lacks {', '.join(missing)}.", "It is damaged, or of another program.")


def objects_of(path: str, values: Mapping[str, Any]) -> list[ObjectRef]:
    """What a document lists under ``objects``; nothing if it has no such key.

    Raises:
        VerificationError: the list has no known form.
    """
    try:
        return [ObjectRef.from_dict(item) for item in values.get("objects", ())]
    except (KeyError, TypeError) as error:
        raise VerificationError(f"{path} lists its objects in no known form.", "It is damaged.") from error


def write_document(storage: Storage, path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Create a JSON document where there is none and return the one that is there now; reads first."""
    try:
        return read_document(storage, path)
    except FileNotFoundError:
        pass
    winner: dict[str, Any] = json.loads(storage.create(path, to_json(values)))
    return winner


def publish_table(
    storage: Storage,
    table: pa.Table,
    path: Callable[[str], str],
    metadata: Mapping[str, str] | None = None,
    present: Container[str] = (),
) -> ObjectRef:
    """Store a table under a name made from its sha256.

    Args:
        storage: the corpus.
        table: the rows.
        path: sha256 -> path.
        metadata: for the Parquet footer.
        present: paths that are there, named by a document: what has one of them is not stored again.
    """
    data = to_parquet(table, metadata)
    sha256 = sha256_hex(data)
    if path(sha256) not in present:
        storage.publish(path(sha256), data)
    return ObjectRef(path=path(sha256), bytes=len(data), sha256=sha256, rows=table.num_rows)


def publish_file(storage: Storage, file: Path, sha256: str, path: str) -> ObjectRef:
    """Store a file of this machine whose sha256 is known."""
    storage.publish(path, file)
    return ObjectRef(path=path, bytes=file.stat().st_size, sha256=sha256)
