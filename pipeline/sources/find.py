"""What an input URL stands for: pictures, a list, tars or Parquet files; told apart by what is there."""

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from iqpir.errors import UsageError
from pipeline.documents import in_threads
from pipeline.sources.inputs import EXTENSIONS, Inputs, Listing, table_of
from pipeline.sources.parquet_files import COLUMN, holds_pictures, read_schema, row_groups
from pipeline.sources.patterns import expand_braces, is_pattern, matcher, split_pattern
from pipeline.sources.ranges import open_ranges
from pipeline.sources.tars import MEMBER, DamagedError, TarIndex
from pipeline.sources.uri_list import list_kind, read_list, to_detail
from pipeline.storage import Entry, Storage

Kind = Literal["auto", "pictures", "list", "webdataset", "parquet"]
Planned = Callable[[str, Mapping[str, str]], Mapping[str, str]]
"""Etags of the tars and Parquet files below a URL that are planned already for a way of reading, by path."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How the input is understood."""

    kind: Kind = "auto"
    """pictures: files below a folder or prefix; list: addresses in a txt, csv, tsv, jsonl or Parquet file; webdataset:
    tars; parquet: encoded pictures in a column. auto: by what --input is."""
    column: str = ""
    """Column of a list that has the addresses (uri, url, path or file_name by default), or of Parquet files that has
    the pictures (image by default)."""
    sha256: str = ""
    """Column of a list that has the sha256 of each picture: other bytes fail, a new value plans the picture again."""
    member: str = ""
    """Extension of the picture in the samples of a tar, such as jpg or hq.png; by default the only one of a picture."""


@dataclass(frozen=True)
class _Files:
    """The files that an input stands for."""

    storage: Storage
    entries: list[Entry]


def find_inputs(url: str, source: SourceConfig, planned: Planned | None = None) -> Listing:
    """What there is to plan at a URL.

    Args:
        url: folder, prefix, list, tar or Parquet file; braces and wildcards stand for several files.
        source: how it is understood.
        planned: what is known about tars and Parquet files; unchanged ones are not opened, their inputs not listed.

    Raises:
        UsageError: it does not exist, has no inputs of the kind, or the kind cannot be told.
    """
    if source.kind == "list" or (source.kind == "auto" and not is_pattern(url) and _is_list(url, source)):
        if not list_kind(url):
            raise UsageError(f"{url} is no list.", "Lists end in .txt, .csv, .tsv, .jsonl, .ndjson (.gz) or .parquet.")
        return read_list(url, source.column, source.sha256)
    files = _files(url)
    kind = _kind(files, source) if source.kind == "auto" else source.kind
    suffixes = {"pictures": EXTENSIONS, "webdataset": {".tar"}, "parquet": {".parquet"}}[kind]
    chosen = [entry for entry in files.entries if _suffix(entry.path) in suffixes]
    if not chosen:
        raise UsageError(
            f"None of the {len(files.entries)} files of {url} ends in {', '.join(sorted(suffixes))}.",
            "Check --input and --source.kind.",
        )
    for entry in chosen:
        if not _is_text(entry.path):
            raise UsageError(f"The file name {entry.path!a} below {url} is no UTF-8.", "Rename it.")
    others = len(files.entries) - len(chosen)
    if kind == "pictures":
        return Listing(url=files.storage.uri(), table=table_of(chosen), ignored=others)
    tars = kind == "webdataset"
    option = {"member": source.member.lower().lstrip(".")} if tars else {"column": source.column or COLUMN}
    reading = {"kind": kind, **option}
    known = planned(files.storage.uri(), reading) if planned is not None else {}
    fresh = [entry for entry in chosen if known.get(entry.path) != entry.etag]
    return _containers(files.storage, fresh, others, reading, _index_tar if tars else _index_parquet)


def _is_list(url: str, source: SourceConfig) -> bool:
    kind = list_kind(url)
    if kind != ".parquet":
        return bool(kind)
    folder, name = posixpath.split(url)
    storage = Storage.open(folder or ".")
    try:
        schema = read_schema(storage, name, storage.stat(name).size)
    except FileNotFoundError:
        return False  # perhaps a folder of that name; else said below
    except DamagedError as error:
        raise UsageError(f"{url} is no Parquet file ({error.message}).") from error
    return not holds_pictures(schema, source.column or COLUMN)


def _files(url: str) -> _Files:
    """Files below a folder, those that a pattern names, or one file."""
    base, pattern = split_pattern(url) if is_pattern(url) else (url, "")
    storage = Storage.open(base)
    entries = storage.list()
    if pattern:
        wanted = [matcher(name) for name in expand_braces(pattern)]
        plain = {name for name in expand_braces(pattern) if not is_pattern(name)}
        chosen = [
            entry
            for entry in entries
            if entry.path in plain or (len(plain) < len(wanted) and any(each.fullmatch(entry.path) for each in wanted))
        ]
        if not chosen:
            raise UsageError(f"Nothing is named like {url}.", "Check --input.")
        missing = sorted(plain - {entry.path for entry in chosen})
        if missing:
            raise UsageError(f"{len(missing)} files of {url} are missing, such as {missing[0]}.", "Check --input.")
        return _Files(storage, chosen)
    if entries:
        return _Files(storage, entries)
    return _one_file(url, storage)


def _one_file(url: str, storage: Storage) -> _Files:
    folder, name = posixpath.split(url.rstrip("/"))
    parent = Storage.open(folder or ".") if name and not folder.endswith(":/") else storage
    try:
        entry = parent.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        local = storage.local("")
        what = "is empty" if local is None or local.is_dir() else "does not exist"
        raise UsageError(f"The input {url} {what}.", "Check --input.") from None
    if _suffix(name) not in (".tar", ".parquet"):
        raise UsageError(
            f"The input {url} is a file of no known kind.",
            "Give a folder or prefix of pictures, a list, tars or Parquet files.",
        )
    return _Files(parent, [entry])


def _kind(files: _Files, source: SourceConfig) -> str:
    """By the files that are there: pictures, else tars, else Parquet files."""
    found = {_suffix(entry.path) for entry in files.entries}
    if found & EXTENSIONS:
        return "pictures"
    if {".tar", ".parquet"} <= found:
        raise UsageError(f"{files.storage.url} has tars and Parquet files.", "Choose with --source.kind.")
    if ".tar" in found:
        return "webdataset"
    if ".parquet" in found:
        return "parquet"
    raise UsageError(
        f"None of the {len(files.entries)} files below {files.storage.url} has a picture's extension.",
        f"Known extensions: {', '.join(sorted(EXTENSIONS))}, .tar, .parquet.",
    )


def _containers(
    storage: Storage,
    entries: Iterable[Entry],
    others: int,
    reading: Mapping[str, str],
    index: Callable[[Storage, Entry, Mapping[str, str]], tuple[pa.Table, int]],
) -> Listing:
    """Inputs within files."""
    found = in_threads(lambda entry: index(storage, entry, reading), entries)
    empty = Inputs(detailed=True).table()
    return Listing(
        url=storage.uri(),
        table=pa.concat_tables([empty, *(table for table, _ in found)]),
        ignored=others + sum(ignored for _, ignored in found),
        reading=reading,
    )


def _index_tar(storage: Storage, entry: Entry, reading: Mapping[str, str]) -> tuple[pa.Table, int]:
    found, names, repeated = Inputs(detailed=True), set(), 0
    with open_ranges(storage, entry.path, entry.size) as file:
        index = TarIndex(file, reading["member"], storage.uri(entry.path))
        try:
            for name, size, detail in index.samples():
                if name in names:
                    repeated += 1
                    continue
                names.add(name)
                found.add(f"{entry.path}{MEMBER}{name}", size, entry.etag, detail)
        except DamagedError as error:
            detail = to_detail({"code": error.code, "message": error.message})
            found.add(entry.path, 0, entry.etag, detail)
    return found.table(), index.ignored + repeated


def _index_parquet(storage: Storage, entry: Entry, reading: Mapping[str, str]) -> tuple[pa.Table, int]:
    found = Inputs(detailed=True)
    try:
        for group, (rows, size) in enumerate(row_groups(storage, entry.path, entry.size, reading["column"])):
            for row in range(rows):
                found.add(f"{entry.path}#row_group={group}&row={row}", size, entry.etag)
    except DamagedError as error:
        found.add(entry.path, 0, entry.etag, to_detail({"code": error.code, "message": error.message}))
    return found.table(), 0


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
