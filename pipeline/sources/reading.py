"""Read the inputs of a unit, whatever kind they are of: in the order of their keys, or as they stream by."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.sources.http import Downloads, HttpConfig
from pipeline.sources.inputs import Fetched, Input, InputError
from pipeline.sources.parquet_files import ParquetReader
from pipeline.sources.tars import TarReader
from pipeline.sources.uri_list import ListReader
from pipeline.storage import Storage


class _Addressed(Protocol):
    def uri(self, entry: Input) -> str: ...

    def fetch(self, entry: Input) -> Fetched: ...


@dataclass(frozen=True)
class Request:
    """One input that is to be read."""

    entry: Input
    uri: str
    fetch: Callable[[], Fetched]
    """Gives the bytes or raises ``InputError`` or, where the store fails, ``OSError``; fit for any thread."""


@dataclass(frozen=True)
class Reader:
    """Requests for the inputs of a unit.

    Attributes:
        keeps_order: whether they come in the order in which they are asked for.
        requests: of these inputs; each holds at most a few pictures.
    """

    keeps_order: bool
    requests: Callable[[Sequence[Input]], Iterator[Request]]
    close: Callable[[], None]


def open_reader(source: str, reading: Mapping[str, Any], http: HttpConfig, max_bytes: int) -> Reader:
    """The reader of a unit.

    Args:
        source: what paths are relative to.
        reading: the kind and its options, as they were planned; empty: a folder of pictures.
        http: for lists.
        max_bytes: longest encoded picture that is read.
    """
    kind = reading.get("kind", "pictures")
    if kind == "parquet":
        parquet = ParquetReader(Storage.open(source), reading["column"])
        return Reader(False, functools.partial(_streamed, parquet), _nothing)
    if kind == "list":
        downloads = Downloads(http, max_bytes)
        found = functools.partial(_addressed, ListReader(source, downloads, max_bytes))
        return Reader(True, found, downloads.close)
    reader = TarReader if kind == "webdataset" else FileReader
    return Reader(True, functools.partial(_addressed, reader(Storage.open(source), max_bytes)), _nothing)


class FileReader:
    """Reads files below a folder or prefix.

    Args:
        source: what paths are relative to.
        max_bytes: longest file that is read.
    """

    def __init__(self, source: Storage, max_bytes: int) -> None:
        self._source, self._max_bytes = source, max_bytes

    def uri(self, entry: Input) -> str:
        """Address of the file."""
        return self._source.uri(entry.relpath)

    def fetch(self, entry: Input) -> Fetched:
        """Bytes of a file.

        Raises:
            InputError: it is gone, changed or too large.
            OSError: the store fails.
        """
        if entry.size > self._max_bytes:
            raise InputError("too_large", f"{entry.size} bytes are more than {self._max_bytes}.")
        try:
            data = self._source.read(entry.relpath)
            now = self._source.stat(entry.relpath)
        except FileNotFoundError as error:
            raise InputError("missing", "The file was planned and is gone.") from error
        if (now.size, now.etag) != (entry.size, entry.etag) or len(data) != entry.size:
            raise InputError("input_changed", "The file changed after it was planned; run again to append it.")
        return Fetched(data, now.etag)


def _addressed(reader: _Addressed, entries: Sequence[Input]) -> Iterator[Request]:
    return (Request(entry, reader.uri(entry), functools.partial(reader.fetch, entry)) for entry in entries)


def _streamed(reader: ParquetReader, entries: Sequence[Input]) -> Iterator[Request]:
    for entry, found in reader.stream(entries):
        yield Request(entry, reader.uri(entry), functools.partial(_given, found))


def _given(found: Fetched | InputError) -> Fetched:
    if isinstance(found, InputError):
        raise found
    return found


def _nothing() -> None:
    """There is nothing to close."""
