"""What every kind of source has in common: planned inputs, listings of them, and why one gives no bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.layout import DETAILED_INPUTS, INPUTS
from pipeline.storage import Entry

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
"""Files that are inputs, by lower-cased suffix; whether they are pictures is found out by decoding."""

TRANSIENT = frozenset({"http_unavailable", "http_timeout", "http_connection", "unreachable"})
"""Codes of failures that another attempt may cure; every other failure stays one."""

BATCH = 1 << 16


class Input(NamedTuple):
    """One planned input."""

    relpath: str
    """Where it is below the source, or its whole address; members and rows of files carry a fragment."""
    size: int
    """Bytes; of a row of a Parquet file an estimate. 0 where ``etag`` is empty."""
    etag: str
    """Of the file that it is (in); ``sha256:...`` where a list gives that; empty where planning asked nobody."""
    detail: str = ""
    """JSON: what else planning knows. List: ``metadata``. Tar: ``offset``, ``sides``. Unreadable file: ``code``,
    ``message``."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What was found at an input URL: columns, not objects, because there may be millions."""

    url: str
    """The folder or prefix that relative paths start from."""
    table: pa.Table
    """``INPUTS`` without ``unit_id`` and ``ordinal``; with ``detail`` where the kind has any."""
    ignored: int
    """Files, members, lines that are no inputs."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """How the inputs are read, beside the settings of the corpus; empty for a folder of pictures."""

    @property
    def count(self) -> int:
        """Inputs in the table."""
        return int(self.table.num_rows)


class InputError(Exception):
    """An input gives no sample; ``code`` becomes part of its status."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(code, message)


@dataclass(frozen=True)
class Fetched:
    """The bytes of one input, as they were read."""

    data: bytes
    etag: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the source says about the picture besides."""


class Inputs:
    """Collects inputs into columns, a batch at a time."""

    def __init__(self, detailed: bool) -> None:
        names = ("relpath", "size", "etag", *(("detail",) if detailed else ()))
        self.schema = pa.schema([(DETAILED_INPUTS if detailed else INPUTS).field(name) for name in names])
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[Any, ...]] = []

    def add(self, relpath: str, size: int, etag: str, detail: str = "") -> None:
        """Append one input."""
        self._rows.append((relpath, size, etag, detail))
        if len(self._rows) >= BATCH:
            self._flush()

    def table(self) -> pa.Table:
        """Everything that was added."""
        self._flush()
        return pa.Table.from_batches(self._batches, self.schema)

    def _flush(self) -> None:
        if self._rows:
            columns = list(zip(*self._rows, strict=True))[: len(self.schema)]
            arrays = [pa.array(column, item.type) for column, item in zip(columns, self.schema, strict=True)]
            self._batches.append(pa.record_batch(arrays, schema=self.schema))
            self._rows = []


def table_of(entries: Iterable[Entry]) -> pa.Table:
    """Files as the table of a ``Listing``."""
    found = Inputs(detailed=False)
    for entry in entries:
        found.add(entry.path, entry.size, entry.etag)
    return found.table()


def in_order(table: pa.Table) -> pa.Table:
    """Rows by path, each path once: the first of equal ones stays."""
    table = table.sort_by("relpath")
    if table.num_rows < 2:
        return table
    indices = table["relpath"].combine_chunks().dictionary_encode().indices.to_numpy()
    return table.filter(pa.array(np.concatenate([[True], np.diff(indices) != 0])))
