"""Work on one unit: read its inputs, decode each to prove it, write the tar and the rows, store both.

A pure function of the unit and the configuration: the same inputs give the same bytes on any machine, for any
number of workers. Every input ends in the tar or in a row that says why not.
"""

import errno
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from iqpir.pixels import PictureError, PixelPolicy
from pipeline.commits.plan import ShardUnit
from pipeline.documents import publish_file, publish_table
from pipeline.layout import SAMPLES, ObjectRef, samples_path, shard_path, to_json
from pipeline.sharding.crops import CropPolicy
from pipeline.sharding.decoding import DecodeConfig, Decoder, open_decoder
from pipeline.sharding.picture_rules import RejectPolicy, ResizePolicy, TilePolicy
from pipeline.sharding.samples import FACTS, Item, Sampling, input_key
from pipeline.sharding.tar import TarWriter
from pipeline.sources.http import HttpConfig
from pipeline.sources.inputs import InputError
from pipeline.sources.reading import Request, open_reader
from pipeline.sources.uri_list import metadata_of
from pipeline.storage import Storage

T = TypeVar("T")
R = TypeVar("R")

REJECTIONS = frozenset(
    {
        "too_large", "too_many_pixels", "unsupported_format", "too_small", "flat", "aspect_ratio", "flat_regions",
    }
)  # fmt: skip
"""Codes of sound files that the configuration excludes; all others are failures."""

_REMARKS = ("icc_broken", "had_alpha", "animated")


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """Turns a unit into objects and a commit record; travels to the workers."""

    corpus: Storage
    pixels: PixelPolicy
    min_side: int
    threads: int
    crop: CropPolicy = field(default_factory=CropPolicy)
    tile: TilePolicy = field(default_factory=TilePolicy)
    resize: ResizePolicy = field(default_factory=ResizePolicy)
    reject: RejectPolicy = field(default_factory=RejectPolicy)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    http: HttpConfig = field(default_factory=HttpConfig)

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
        inputs = sorted(unit.inputs, key=lambda entry: input_key(unit.collection, entry.relpath))
        reader = open_reader(unit.source, unit.reading, self.http, self.pixels.max_bytes)
        sampling = Sampling(self.min_side, self.crop, self.tile, self.resize, self.reject)
        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(self.threads) as pool, open_decoder(self.decode, self.pixels) as decoder:

            def examine(request: Request) -> list[Item]:
                return _examine(unit, request, decoder, sampling)

            try:
                examined = ordered_map(pool, examine, reader.requests(inputs), 2 * self.threads)
                items = (item for found in examined for item in found)
                for item in items if reader.keeps_order and not sampling.cuts else _by_key(items, folder):
                    rows.append(_add(tar, item))
            finally:
                reader.close()
        return sorted(rows, key=lambda row: row["key"])


def _examine(unit: ShardUnit, request: Request, decoder: Decoder, sampling: Sampling) -> list[Item]:
    """Read and decode one input: its samples, or the row that says why there are none."""
    entry = request.entry
    row: dict[str, Any] = {
        **dict.fromkeys(SAMPLES.names),
        "key": input_key(unit.collection, entry.relpath),
        "uri": request.uri,
        "relpath": entry.relpath,
        "collection": unit.collection,
        "input_etag": entry.etag,
        "input_size": entry.size,
        "unit_id": unit.unit_id,
        "ordinal": unit.ordinal,
        "metadata": _metadata({}, metadata_of(entry)),
    }
    try:
        found = request.fetch()
        row |= {"input_etag": found.etag, "input_size": len(found.data), "metadata": _metadata({}, found.metadata)}
        facts, pixels = decoder(found.data, sampling.needs_pixels)
        row |= {name: facts[name] for name in FACTS}
        row["metadata"] = _metadata(facts, found.metadata)
        return sampling(row, found.data, pixels)
    except (PictureError, InputError) as error:
        kind = "rejected" if error.code in REJECTIONS else "failed"
        problem = {"error_code": error.code, "error_message": error.message}
        return [Item({**row, "status": f"{kind}_{error.code}", **problem}, None)]


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


def _metadata(facts: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """Remarks on the picture, and what its source says; names of the source that are taken get a prefix."""
    remarks = {name: True for name in _REMARKS if facts.get(name)}
    if not remarks and not source:
        return "{}"
    said = {f"source_{name}" if name in _REMARKS else name: value for name, value in source.items()}
    return to_json({**said, **remarks}).decode().strip()


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
    names = ("key", "collection", "relpath", "sha256", *FACTS, "crop_x", "crop_y", "crop_size")
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
