"""Work on one unit: read its inputs, decode each to prove it, write the tar and the rows, store both.

A pure function of the unit and the configuration: the same inputs give the same bytes on any machine, for any
number of workers. Every input ends in the tar or in a row that says why not.
"""

import errno
import functools
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from iqpir.pixels import Picture, PictureError, PixelPolicy, decode, encode_png
from pipeline.crops import CropPolicy, choose_windows, cut
from pipeline.documents import publish_file, publish_table
from pipeline.layout import SAMPLES, ObjectRef, samples_path, sha256_hex, shard_path, to_json
from pipeline.plan import Input, ShardUnit
from pipeline.storage import Storage
from pipeline.tar import TarWriter

T = TypeVar("T")
R = TypeVar("R")

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "GIF": "gif"}
"""Member suffix by format: the content decides, not the input's name."""

REJECTIONS = frozenset({"too_large", "too_many_pixels", "unsupported_format", "too_small", "flat"})
"""Codes of sound files that the configuration excludes; all others are failures."""

_CROP_COMPRESSION = 6
_FACTS = (
    "format", "width", "height", "original_width", "original_height", "channels", "bit_depth",
    "exif_orientation", "icc_profile",
)  # fmt: skip
_REMARKS = ("icc_broken", "had_alpha", "animated")


class InputError(Exception):
    """An input gives no sample; ``code`` becomes part of its status."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(code, message)


@dataclass(frozen=True)
class Item:
    """A row, and the encoded sample it is about (None for an input without one)."""

    row: dict[str, Any]
    data: bytes | None


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """Turns a unit into objects and a commit record; travels to the workers."""

    corpus: Storage
    crop: CropPolicy
    pixels: PixelPolicy
    min_side: int
    threads: int

    def __call__(self, unit: ShardUnit) -> dict[str, Any]:
        """The commit record of ``unit``; its payload is stored.

        Raises:
            OSError: the storage failed, or the scratch disk is full; worth another attempt.
        """
        with tempfile.TemporaryDirectory(prefix="iqpir-shard-") as scratch:
            folder = Path(scratch)
            _require_space(folder, 2 * sum(entry.size for entry in unit.inputs))
            with TarWriter(folder / "shard.tar") as tar:
                rows = self._fill(tar, unit, folder)
            objects = []
            if any(row["status"] == "success" for row in rows):
                shard = shard_path(unit.collection, unit.ordinal, tar.sha256)
                objects.append(publish_file(self.corpus, tar.path, tar.sha256, shard))
                _name_shard(rows, shard)
            table = pa.Table.from_pylist(rows, schema=SAMPLES)
            objects.append(publish_table(self.corpus, table, lambda sha256: samples_path(unit.ordinal, sha256)))
        return _record(unit, rows, objects)

    def _fill(self, tar: TarWriter, unit: ShardUnit, folder: Path) -> list[dict[str, Any]]:
        """Write every sample of ``unit`` to ``tar``, by key; returns all rows, by key."""
        inputs = sorted(
            ((input_key(unit.collection, entry.relpath), entry) for entry in unit.inputs),
            key=lambda pair: pair[0],
        )
        source = Storage.open(unit.source)
        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(self.threads) as pool:
            examine = functools.partial(self._examine, unit, source)
            examined = ordered_map(pool, lambda pair: examine(*pair), inputs, 2 * self.threads)
            items = (item for found in examined for item in found)
            for item in _by_key(items, folder) if self.crop.size else items:
                rows.append(_add(tar, item))
        return sorted(rows, key=lambda row: row["key"])

    def _examine(self, unit: ShardUnit, source: Storage, key: str, entry: Input) -> list[Item]:
        row = {
            **dict.fromkeys(SAMPLES.names),
            "key": key,
            "uri": source.uri(entry.relpath),
            "relpath": entry.relpath,
            "collection": unit.collection,
            "input_etag": entry.etag,
            "input_size": entry.size,
            "unit_id": unit.unit_id,
            "ordinal": unit.ordinal,
            "metadata": "{}",
        }
        try:
            data = self._read(source, entry)
            picture = decode(data, self.pixels)
            row.update(_facts(picture))
            return self._samples(row, data, picture)
        except (PictureError, InputError) as error:
            kind = "rejected" if error.code in REJECTIONS else "failed"
            problem = {"error_code": error.code, "error_message": error.message}
            return [Item({**row, "status": f"{kind}_{error.code}", **problem}, None)]

    def _read(self, source: Storage, entry: Input) -> bytes:
        if entry.size > self.pixels.max_bytes:
            raise InputError("too_large", f"{entry.size} bytes are more than {self.pixels.max_bytes}.")
        try:
            data = source.read(entry.relpath)
            now = source.stat(entry.relpath)
        except FileNotFoundError as error:
            raise InputError("missing", "The file was planned and is gone.") from error
        if (now.size, now.etag) != (entry.size, entry.etag) or len(data) != entry.size:
            raise InputError("input_changed", "The file changed after it was planned; run again to append it.")
        return data

    def _samples(self, row: dict[str, Any], data: bytes, picture: Picture) -> list[Item]:
        smallest = max(self.min_side, self.crop.size)
        if min(picture.width, picture.height) < smallest:
            raise InputError("too_small", f"{picture.width} x {picture.height} has a side below {smallest}.")
        if not self.crop.size:
            return [_sample(row, row["key"], SUFFIXES[picture.format], data)]
        windows = choose_windows(picture.array, row["key"], self.crop)
        if not windows:
            raise InputError("flat", f"Every crop has a luma deviation below {self.crop.min_std}.")
        size, items = self.crop.size, []
        for window in windows:
            place = {"crop_x": window.x, "crop_y": window.y, "crop_size": size, "width": size, "height": size}
            key = input_key(row["collection"], f"{row['relpath']}#{window.x},{window.y},{size}")
            png = encode_png(cut(picture.array, window, size), _CROP_COMPRESSION)
            items.append(_sample({**row, **place, "format": "PNG"}, key, "png", png))
        return items


def input_key(collection: str, relpath: str) -> str:
    """32 hex digits: without dots, so that tools which split names at the first dot cannot merge samples."""
    return sha256_hex(f"{collection}/{relpath}".encode())[:32]


def ordered_map(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Results in the order of ``items``, at most ``ahead`` of them computed before they are taken."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _facts(picture: Picture) -> dict[str, Any]:
    facts = picture.facts()
    remarks = {name: True for name in _REMARKS if facts[name]}
    return {**{name: facts[name] for name in _FACTS}, "metadata": to_json(remarks).decode().strip()}


def _sample(row: dict[str, Any], key: str, suffix: str, data: bytes) -> Item:
    return Item(
        {
            **row,
            "key": key,
            "status": "success",
            "member": f"{key}.{suffix}",
            "byte_size": len(data),
            "sha256": sha256_hex(data),
        },
        data,
    )


def _by_key(items: Iterable[Item], folder: Path) -> Iterator[Item]:
    """``items`` ordered by key; their data waits on the scratch disk."""
    spooled: list[tuple[dict[str, Any], int]] = []
    with (folder / "spool").open("w+b") as spool:
        for item in items:
            if item.data is None:
                yield item
            else:
                spooled.append((item.row, spool.tell()))
                spool.write(item.data)
        for row, offset in sorted(spooled, key=lambda pair: str(pair[0]["key"])):
            spool.seek(offset)
            yield Item(row, spool.read(row["byte_size"]))


def _add(tar: TarWriter, item: Item) -> dict[str, Any]:
    """Write a sample and its JSON; returns its row, with the place."""
    if item.data is None:
        return item.row
    row = {**item.row, "byte_offset": tar.add(item.row["member"], item.data)}
    names = ("key", "collection", "relpath", "sha256", *_FACTS, "crop_x", "crop_y", "crop_size")
    tar.add(f"{row['key']}.json", to_json({name: row[name] for name in names if row[name] is not None}))
    return row


def _name_shard(rows: list[dict[str, Any]], shard: str) -> None:
    for row in rows:
        if row["status"] == "success":
            row["shard"] = shard


def _record(unit: ShardUnit, rows: list[dict[str, Any]], objects: list[ObjectRef]) -> dict[str, Any]:
    statuses = Counter({row["relpath"]: row["status"] for row in rows}.values())
    kinds = Counter({"success": 0, "rejected": 0, "failed": 0})
    for status, count in statuses.items():
        kinds[status.partition("_")[0]] += count
    if sum(kinds.values()) != len(unit.inputs):
        raise RuntimeError(f"unit {unit.ordinal}: {len(unit.inputs)} inputs, {dict(statuses)} accounted for")
    return {
        "ordinal": unit.ordinal,
        "generation": unit.generation,
        "collection": unit.collection,
        "inputs": len(unit.inputs),
        **kinds,
        "samples": sum(row["status"] == "success" for row in rows),
        "rows": len(rows),
        "statuses": dict(statuses),
        "objects": [ref.to_dict() for ref in objects],
    }


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{free} bytes free, a unit needs {size}; set TMPDIR", str(folder))
