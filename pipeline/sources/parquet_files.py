"""Parquet files with encoded pictures in a column, as Hugging Face writes them: binary, or struct {bytes, path}.

Planning reads footers only. A unit is read row group by row group, in small batches of rows, so that memory holds a
few pictures, never a file.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.inputs import Fetched, Input, InputError
from pipeline.sources.ranges import open_ranges
from pipeline.sources.tars import DamagedError
from pipeline.sources.uri_list import json_values
from pipeline.storage import Storage

ROW = re.compile(r"#row_group=(\d+)&row=(\d+)$")
COLUMN = "image"
"""Column of the pictures where none is named, as in Hugging Face's data sets."""
_BATCH = 8


def holds_pictures(schema: pa.Schema, column: str) -> bool:
    """Whether ``column`` has encoded pictures."""
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        return "bytes" in names and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def read_schema(storage: Storage, path: str, size: int) -> pa.Schema:
    """Columns of a file.

    Raises:
        DamagedError: it is no Parquet file.
    """
    with open_ranges(storage, path, size) as file, _opened(file, path) as table:
        return table.schema_arrow


def row_groups(storage: Storage, path: str, size: int, column: str) -> list[tuple[int, int]]:
    """Rows of each row group, and the mean bytes of a picture in it, from the footer.

    Raises:
        DamagedError: it is no Parquet file, or has no pictures in ``column``.
    """
    with open_ranges(storage, path, size) as file, _opened(file, path) as table:
        if not holds_pictures(table.schema_arrow, column):
            names = ", ".join(table.schema_arrow.names)
            raise DamagedError("parquet_column", f"{path} has no pictures in {column}, it has {names}.")
        footer = table.metadata
        return [
            (group.num_rows, -(-_column_bytes(group, column) // max(group.num_rows, 1)))
            for group in map(footer.row_group, range(footer.num_row_groups))
        ]


class ParquetReader:
    """Reads rows of Parquet files below a folder or prefix.

    Args:
        source: what paths are relative to.
        column: that has the pictures.
    """

    def __init__(self, source: Storage, column: str) -> None:
        self._source, self._column = source, column

    def uri(self, entry: Input) -> str:
        """Address of the file, and the row as a fragment."""
        return self._source.uri() + "/" + entry.relpath

    def stream(self, entries: Iterable[Input]) -> Iterator[tuple[Input, Fetched | InputError]]:
        """The bytes of these rows in the order of the files, a few at a time.

        Raises:
            OSError: the store fails.
        """
        files: dict[str, list[tuple[int, int, Input]]] = {}
        for entry in entries:
            place = ROW.search(entry.relpath)
            if place is None:
                detail = json.loads(entry.detail)
                yield entry, InputError(detail["code"], detail["message"])
            else:
                row = int(place[1]), int(place[2]), entry
                files.setdefault(entry.relpath[: place.start()], []).append(row)
        for path in sorted(files):
            yield from self._file(path, sorted(files[path]))

    def _file(self, path: str, rows: Sequence[tuple[int, int, Input]]) -> Iterator[tuple[Input, Fetched | InputError]]:
        left = {(group, row): entry for group, row, entry in rows}
        try:
            for place, found in self._rows(path, rows[0][2].etag, rows):
                yield left.pop(place), found
            error = InputError("input_changed", f"{path} changed after it was planned; run again to append it.")
        except FileNotFoundError:
            error = InputError("missing", f"{path} was planned and is gone.")
        except DamagedError as damage:
            error = InputError(damage.code, damage.message)
        except (pa.ArrowException, OSError) as damage:
            if isinstance(damage, OSError) and damage.errno is not None:
                raise  # of the store; Arrow gives no number to damaged pages
            error = InputError("parquet_corrupt", f"{path}: {' '.join(str(damage).split())}"[:300])
        for entry in left.values():
            yield entry, error

    def _rows(
        self, path: str, etag: str, rows: Sequence[tuple[int, int, Input]]
    ) -> Iterator[tuple[tuple[int, int], Fetched | InputError]]:
        """Row group, row and picture; ends early where the file is another one than was planned."""
        size = self._source.stat(path).size
        with open_ranges(self._source, path, size) as file, _opened(file, path) as table:
            for group, chosen in groupby(rows, key=lambda row: row[0]):
                if group >= table.metadata.num_row_groups:
                    return
                for found in _batches(table, group, {row for _, row, _ in chosen}):
                    if self._source.stat(path).etag != etag:
                        return
                    for row, values in found:
                        yield (group, row), self._fetched(values, etag)

    def _fetched(self, values: Mapping[str, Any], etag: str) -> Fetched | InputError:
        picture = values[self._column]
        rest = {name: value for name, value in values.items() if name != self._column}
        if isinstance(picture, dict):
            rest |= {"path": picture["path"]} if picture.get("path") else {}
            picture = picture["bytes"]
        if picture is None:
            return InputError("no_bytes", f"The row has no bytes in {self._column}.")
        return Fetched(picture, etag, json_values(rest))


def _batches(table: pq.ParquetFile, group: int, wanted: set[int]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Number and values of the wanted rows of a row group, a few at a time."""
    first = 0
    for batch in table.iter_batches(_BATCH, row_groups=[group], use_threads=False):
        chosen = [row for row in range(batch.num_rows) if first + row in wanted]
        if chosen:
            yield [(first + row, batch.slice(row, 1).to_pylist()[0]) for row in chosen]
        first += batch.num_rows


def _opened(file: io.BufferedReader, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedError("parquet_corrupt", f"{path}: {' '.join(str(error).split())}"[:300]) from error


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
