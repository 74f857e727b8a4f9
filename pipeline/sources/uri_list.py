"""Lists of addresses: txt, csv, tsv, jsonl (each also .gz) and Parquet.

Paths without a protocol start from the folder of the list. Files of this machine are looked at while planning, so
that changed ones are seen; everything else is asked only where the unit is worked on.
"""

import csv
import gzip
import json
import os
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from iqpir.errors import UsageError
from pipeline.layout import sha256_hex
from pipeline.sources.http import Downloads
from pipeline.sources.inputs import Fetched, Input, InputError, Inputs, Listing, in_order
from pipeline.storage import Storage
from pipeline.stores.objects import PROTOCOLS

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
COLUMNS = ("uri", "url", "path", "file_name")
"""Columns that are looked for where no column is named."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_SCHEMES = PROTOCOLS | {"", "file", "http", "https"}
"""What a list may name; paths have none."""
_BATCH = 4096


def list_kind(name: str) -> str:
    """Suffix that says how a list is written, without .gz; empty where it is none."""
    suffix = posixpath.splitext(name.lower().removesuffix(".gz"))[1]
    return suffix if suffix in SUFFIXES else ""


def read_list(url: str, column: str, sha256: str) -> Listing:
    """Addresses of a list, by address, each once.

    Args:
        url: of the list.
        column: that has the address; by default the first of ``COLUMNS``, or the only one.
        sha256: column that has the picture's sha256; none by default.

    Raises:
        UsageError: it is missing, has no such column, no address, or a line of another form.
    """
    folder, name = os.path.split(url)
    storage = Storage.open(folder or ".")
    found, empty = Inputs(detailed=True), 0
    with _local(storage, name) as file:
        for number, row in enumerate(_rows(file, name, column), 1):
            address, expected, metadata = _taken(row, column, sha256, f"row {number} of {url}")
            if not address:
                empty += 1
                continue
            size, etag = (0, f"sha256:{expected}") if expected else _facts(storage, address)
            detail = to_detail({"metadata": metadata}) if metadata else ""
            found.add(_normal(address), size, etag, detail)
    table = found.table()
    unique = in_order(table)
    if not unique.num_rows:
        raise UsageError(f"The list {url} names no picture.", "Check --source.column.")
    ignored = empty + table.num_rows - unique.num_rows
    return Listing(url=storage.uri(), table=unique, ignored=ignored, reading={"kind": "list"})


def to_detail(values: Mapping[str, Any]) -> str:
    """``Input.detail``: compact JSON without anything that JSON has no form for."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class ListReader:
    """Reads the inputs of a list: files, objects, http(s) addresses.

    Args:
        base: where relative paths start.
        downloads: for http(s).
        max_bytes: longest file that is read.
    """

    def __init__(self, base: str, downloads: Downloads, max_bytes: int) -> None:
        self._base, self._downloads, self._max_bytes = base, downloads, max_bytes
        self._stores: dict[str, Storage | InputError] = {}

    def uri(self, entry: Input) -> str:
        """Address of an input, relative ones made whole."""
        return resolve(self._base, entry.relpath)

    def fetch(self, entry: Input) -> Fetched:
        """Bytes of an input.

        Raises:
            InputError: it is gone, changed, too large, refused, or cannot be had.
            OSError: the store fails.
        """
        uri = self.uri(entry)
        scheme = uri[: match.end()] if (match := _SCHEME.match(uri)) else ""
        if scheme.removesuffix("://") not in _SCHEMES:
            raise InputError("unsupported_scheme", f"{scheme} is not among {', '.join(sorted(_SCHEMES - {''}))}.")
        remote = scheme in ("http://", "https://")
        found = self._downloads.fetch(uri) if remote else self._stored(entry, uri)
        if entry.etag.startswith("sha256:"):
            require_sha256(found.data, entry.etag.removeprefix("sha256:"))
        return Fetched(found.data, found.etag, metadata_of(entry))

    def _stored(self, entry: Input, uri: str) -> Fetched:
        store, path = self._store(uri)
        try:
            before = store.stat(path)
            if before.size > self._max_bytes:
                raise InputError("too_large", f"{before.size} bytes are more than {self._max_bytes}.")
            data = store.read(path)
            now = store.stat(path)
        except FileNotFoundError as error:
            raise InputError("missing", f"There is no {uri}.") from error
        except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
            raise InputError("unreadable", f"{uri} may not be read, or is no file.") from error
        planned = entry.etag and not entry.etag.startswith("sha256:")
        known = (entry.size, entry.etag) if planned else (before.size, before.etag)
        if (now.size, now.etag) != known or len(data) != now.size:
            raise InputError("input_changed", "The file changed after it was planned; run again to append it.")
        return Fetched(data, now.etag)

    def _store(self, uri: str) -> tuple[Storage, str]:
        root, path = _root(uri)
        if root not in self._stores:
            try:
                self._stores[root] = Storage.open(root)
            except UsageError as error:
                self._stores[root] = InputError("unreachable", str(error))
        store = self._stores[root]
        if isinstance(store, InputError):
            raise InputError(store.code, store.message)
        return store, path


def metadata_of(entry: Input) -> dict[str, Any]:
    """What planning wrote down about the picture."""
    found = json.loads(entry.detail).get("metadata", {}) if entry.detail else {}
    return dict(found)


def require_sha256(data: bytes, expected: str) -> None:
    """Raise ``InputError`` unless ``data`` has this sha256."""
    found = sha256_hex(data)
    if found != expected:
        raise InputError("sha256_mismatch", f"The sha256 is {found}, the list says {expected}.")


def resolve(base: str, address: str) -> str:
    """``address`` whole: an absolute path, or with its protocol; relative ones start from ``base``."""
    if _SCHEME.match(address):
        address = _normal(address)
        return address.removeprefix("file://") if address.startswith("file:///") else address
    scheme = _SCHEME.match(base)
    if scheme is None or address.startswith("/"):
        return os.path.normpath(os.path.join(base, address))
    return scheme[0] + posixpath.normpath(posixpath.join(base[scheme.end() :], address))


def _normal(address: str) -> str:
    """One form of an address, for what is the same place in any case: its protocol is written small."""
    scheme = _SCHEME.match(address)
    return scheme[0].lower() + address[scheme.end() :] if scheme else posixpath.normpath(address)


def _root(uri: str) -> tuple[str, str]:
    """The widest storage that has ``uri``, and the path in it."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return "/", uri.lstrip("/")
    first, _, rest = uri[scheme.end() :].partition("/")
    return scheme[0] + first, rest


def _facts(storage: Storage, address: str) -> tuple[int, str]:
    """Size and etag of a file of this machine; 0 and empty for all else."""
    if storage.local("") is None and not address.startswith(("/", "file:///")):
        return 0, ""
    uri = resolve(storage.uri(), address)
    if _SCHEME.match(uri):
        return 0, ""
    try:
        facts = os.stat(uri)
    except (OSError, ValueError):  # the worker says what is wrong with it
        return 0, ""
    return facts.st_size, str(facts.st_mtime_ns)


@contextmanager
def _local(storage: Storage, name: str) -> Iterator[Path]:
    """The list as a file of this machine."""
    path = storage.local(name)
    with ExitStack() as stack:
        try:
            storage.stat(name)
            if path is None:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="iqpir-list-"))) / "list"
                storage.download(name, path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"The input {storage.uri(name)} does not exist.", "Check --input.") from error
        yield path


def _rows(file: Path, name: str, column: str) -> Iterator[dict[str, Any]]:
    """Rows as column -> value; the address under ``uri`` in a txt."""
    kind = list_kind(name)
    if kind == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        options: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
        packed = name.lower().endswith(".gz")
        with gzip.open(file, "rt", **options) if packed else file.open(**options) as text:
            if kind == ".txt":
                yield from ({column or "uri": line.strip()} for line in text)
            elif kind in (".csv", ".tsv"):
                yield from csv.DictReader(text, delimiter="," if kind == ".csv" else "\t", strict=True)
            else:
                yield from _json_rows(text, name)
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"The list {name} cannot be read: {error}.", "Lists are UTF-8 text.") from error


def _json_rows(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"Line {number} of {name} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UsageError(f"Line {number} of {name} is no JSON object.")
        yield row


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file, pre_buffer=False) as table:
            for batch in table.iter_batches(_BATCH, use_threads=False):
                yield from (json_values(row) for row in batch.to_pylist())
    except pa.ArrowInvalid as error:
        raise UsageError(f"The list {file.name} is no Parquet file: {error}.") from error


def json_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a row that JSON can say; dates and decimals as text, bytes not at all."""
    return {name: json.loads(json.dumps(value, default=str)) for name, value in row.items() if _has_json(value)}


def _has_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_has_json(each) for each in value.values())
    if isinstance(value, list):
        return all(_has_json(each) for each in value)
    return value is not None and not isinstance(value, bytes)


def _taken(row: Mapping[str, Any], column: str, sha256: str, where: str) -> tuple[str, str, dict[str, Any]]:
    """Address, sha256 and the other columns of a row."""
    chosen = column or next((name for name in COLUMNS if name in row), "")
    if not chosen and len(row) == 1:
        chosen = next(iter(row))
    for name in (chosen, *((sha256,) if sha256 else ())):
        if name not in row:
            raise UsageError(
                f"{where} has no column {name or ' or '.join(COLUMNS)}.",
                f"It has {', '.join(map(str, row))}; choose with --source.column and --source.sha256.",
            )
    expected = str(row[sha256] or "").lower() if sha256 else ""
    if expected and not _SHA256.fullmatch(expected):
        raise UsageError(f"{where}: {expected!r} is no sha256.", "Give 64 hex digits.")
    address = row[chosen]
    if address is not None and not isinstance(address, str):
        raise UsageError(f"{where}: {chosen} is no text.", "Choose the column of the addresses with --source.column.")
    rest = {str(name): value for name, value in row.items() if name not in (chosen, sha256) and value not in (None, "")}
    return (address or "").strip(), expected, rest
