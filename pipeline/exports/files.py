"""A view as webdataset tars of its own, or as plain files; the labels beside them.

``_export.json`` claims the folder for one content, ``export.json`` is written last and lists every file with
its sha256.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import PictureError, PixelPolicy, decode, encode_png
from pipeline.commits.manifest import differs
from pipeline.corpus import Corpus
from pipeline.documents import publish_file, read_document, write_document
from pipeline.exports.beton import Picture
from pipeline.layout import SAMPLE_REFERENCE, ObjectRef, sha256_hex, to_json, to_parquet
from pipeline.progress import progress
from pipeline.sharding.tar import TarWriter
from pipeline.storage import Storage
from pipeline.training.shard_cache import ShardCache

CLAIM = "_export.json"
RECORD = "export.json"
LABELS = "labels.parquet"
Fit = Callable[[Picture], Picture]


@dataclass(frozen=True)
class Exported:
    """What the record stands for."""

    bytes: int
    """Of all files it lists."""
    sha256: str
    """Of the record itself."""
    written: bool
    """False: an earlier run had finished it."""


@dataclass(frozen=True)
class Member:
    """One picture on its way out."""

    row: dict[str, Any]
    name: str
    data: bytes


def export_tars(
    corpus: Corpus,
    rows: pa.Table,
    target: Storage,
    identity: Mapping[str, Any],
    pixels: PixelPolicy,
    fit: Fit | None,
    cache: str = "",
    shares: Sequence[int] = (),
) -> Exported:
    """``<view>-000000.tar``...: ``<key>.<ext>`` and ``<key>.json`` (the labels), in the view's order.

    Args:
        corpus: where the samples are.
        rows: of the view.
        target: the output folder.
        identity: what decides the content; ``shard_bytes`` cuts the tars.
        pixels: how bytes become pixels, where they do.
        fit: what is done to each picture, stored as PNG; None: the original bytes.
        cache: folder for whole shards of a remote corpus.
        shares: how many rows each tar takes; empty: as many as ``shard_bytes`` lets in.

    Raises:
        UsageError: the folder holds another export.
        VerificationError: bytes are not those that were committed.
    """

    def write() -> Iterator[tuple[ObjectRef, list[tuple[str, str]]]]:
        stem = str(identity["view"]).partition("@")[0]
        with tempfile.TemporaryDirectory(prefix="iqpir-export-") as folder:
            members = _members(corpus, rows, pixels, fit, cache)
            for number, first in enumerate(members):
                file = Path(folder) / f"{stem}-{number:06d}.tar"
                tar = TarWriter(file)
                left = itertools.chain([first], members)
                limit = None if shares else int(identity["shard_bytes"])
                names = _fill(tar, itertools.islice(left, shares[number]) if shares else left, limit)
                yield publish_file(target, file, tar.sha256, file.name), [(file.name, name) for name in names]
                file.unlink()

    return _finish(target, rows, identity, write)


def export_files(
    corpus: Corpus,
    rows: pa.Table,
    target: Storage,
    identity: Mapping[str, Any],
    pixels: PixelPolicy,
    fit: Fit | None,
    cache: str = "",
) -> Exported:
    """``pictures/<key>.<ext>``; arguments and errors as ``export_tars``."""

    def write() -> Iterator[tuple[ObjectRef, list[tuple[str, str]]]]:
        for member in _members(corpus, rows, pixels, fit, cache):
            path = f"pictures/{member.name}"
            target.publish(path, member.data)
            reference = ObjectRef(path=path, bytes=len(member.data), sha256=sha256_hex(member.data))
            yield reference, [("", path)]

    return _finish(target, rows, identity, write)


def _finish(
    target: Storage,
    rows: pa.Table,
    identity: Mapping[str, Any],
    write: Callable[[], Iterator[tuple[ObjectRef, list[tuple[str, str]]]]],
) -> Exported:
    """Claim the folder, write the pictures, then the labels, then the record."""
    claimed = write_document(target, CLAIM, identity)
    different = sorted(name for name in identity if claimed.get(name) != identity[name])
    if different:
        raise UsageError(
            f"{target.url} holds an export with another {', '.join(different)}.", "Choose another --output."
        )
    if target.exists(RECORD):
        return _earlier(target)
    objects: list[ObjectRef] = []
    places: list[tuple[str, str]] = []
    with progress(rows.num_rows, "export") as meter:
        for reference, found in write():
            objects.append(reference)
            places += found
            meter.advance(len(found))
    objects.append(_write_labels(target, rows, places))
    record = to_json({**identity, "count": rows.num_rows, "objects": [item.to_dict() for item in objects]})
    target.publish(RECORD, record)
    return Exported(sum(item.bytes for item in objects), sha256_hex(record), written=True)


def _earlier(target: Storage) -> Exported:
    """The finished export, its files compared by size.

    Raises:
        VerificationError: a file is absent or has another size.
    """
    objects = [ObjectRef.from_dict(values) for values in read_document(target, RECORD)["objects"]]
    sizes = {entry.path: entry.size for entry in target.list()}
    for item in objects:
        if sizes.get(item.path) != item.bytes:
            raise VerificationError(
                f"{target.uri(item.path)} is not what {RECORD} says.",
                f"Delete {RECORD} and run the command again.",
            )
    return Exported(sum(item.bytes for item in objects), sha256_hex(target.read(RECORD)), written=False)


def _write_labels(target: Storage, rows: pa.Table, places: list[tuple[str, str]]) -> ObjectRef:
    """The view's rows with where each picture is now: ``file`` (a tar, or empty) and ``member``."""
    located = rows.drop_columns(["shard", "member", "byte_offset", "byte_size", "sha256"])
    located = located.append_column("file", pa.array([file for file, _ in places], pa.string()))
    located = located.append_column("member", pa.array([member for _, member in places], pa.string()))
    data = to_parquet(located)
    target.publish(LABELS, data)
    return ObjectRef(path=LABELS, bytes=len(data), sha256=sha256_hex(data), rows=rows.num_rows)


def _members(corpus: Corpus, rows: pa.Table, pixels: PixelPolicy, fit: Fit | None, folder: str) -> Iterator[Member]:
    cache = ShardCache(corpus, folder)
    for batch in rows.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            data = cache.read(row["shard"], row["byte_offset"], row["byte_size"])
            if sha256_hex(data) != row["sha256"]:
                raise differs(corpus.storage, f"{row['shard']} at byte {row['byte_offset']}")
            if fit is None:
                yield Member(row, row["member"], data)
                continue
            try:
                picture = decode(data, pixels).array
            except PictureError as error:
                raise UsageError(
                    f"Sample {row['key']} does not decode ({error}).", "Is the pixel policy the corpus's?"
                ) from error
            yield Member(row, f"{row['key']}.png", encode_png(fit(picture)))


def _fill(tar: TarWriter, members: Iterator[Member], limit: int | None) -> list[str]:
    """Take members until they have ``limit`` bytes together, if there is one, or end; their pictures' names."""
    names: list[str] = []
    size = 0
    with tar:
        for member in members:
            tar.add(member.name, member.data)
            tar.add(f"{member.row['key']}.json", _label_json(member.row))
            names.append(member.name)
            size += len(member.data)
            if limit is not None and size >= limit:
                break
    return names


def _label_json(row: Mapping[str, Any]) -> bytes:
    """key, width, height and every label column."""
    place = set(SAMPLE_REFERENCE.names) - {"key", "width", "height"}
    return to_json({name: value for name, value in row.items() if name not in place})
