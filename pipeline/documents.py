"""Read and write the documents, tables and files of a corpus, many at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from iqpir.errors import VerificationError
from pipeline.layout import ObjectRef, sha256_hex, to_json, to_parquet
from pipeline.storage import Storage

T = TypeVar("T")
R = TypeVar("R")

READ_THREADS = 16


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
    try:
        values = json.loads(storage.read(path))
    except ValueError as error:
        raise VerificationError(f"{storage.uri(path)} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise VerificationError(f"{storage.uri(path)} is no JSON object.")
    return values


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
    storage: Storage, table: pa.Table, path: Callable[[str], str], metadata: Mapping[str, str] | None = None
) -> ObjectRef:
    """Store a table under a name made from its sha256.

    Args:
        storage: the corpus.
        table: the rows.
        path: sha256 -> path.
        metadata: for the Parquet footer.
    """
    data = to_parquet(table, metadata)
    sha256 = sha256_hex(data)
    storage.publish(path(sha256), data)
    return ObjectRef(path=path(sha256), bytes=len(data), sha256=sha256, rows=table.num_rows)


def publish_file(storage: Storage, file: Path, sha256: str, path: str) -> ObjectRef:
    """Store a file of this machine whose sha256 is known."""
    storage.publish(path, file)
    return ObjectRef(path=path, bytes=file.stat().st_size, sha256=sha256)
