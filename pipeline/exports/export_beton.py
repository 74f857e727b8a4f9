"""Write a view as an ffcv ``.beton``: checked against the corpus, durable, and never half there.

The file takes its name only after it was read back; the sidecar ``<name>.beton.json`` comes last. A
``.beton`` without it is unfinished, and ``pipeline.training.ffcv_feed`` refuses it.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy, decode
from iqpir.training.checkpoint import file_sha256
from pipeline.corpus import Corpus
from pipeline.exports.beton import (
    BetonFacts,
    BetonPlan,
    Mode,
    Picture,
    page_size_for,
    require_ffcv,
    write_beton,
)
from pipeline.exports.beton_reader import read_back
from pipeline.progress import progress
from pipeline.storage import Storage
from pipeline.training.feed import Fit, fit_picture
from pipeline.view import View

_COMPARED = 8
"""Pictures of a written ``.beton`` that are compared with the corpus."""
_JPEG_BYTES_PER_PIXEL = 4
"""More than any JPEG of 8-bit RGB needs, headers aside."""
_JPEG_HEADER_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class BetonRequest:
    """How a view becomes a ``.beton``."""

    size: int
    """Side of every picture in pixels."""
    fit: Fit
    mode: Mode
    jpeg_quality: int
    workers: int
    """Processes that decode; 0: one a CPU."""
    stall_s: float
    """Seconds without a new sample after which the writer is stopped."""
    cache: str = ""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)

    @property
    def largest(self) -> int:
        """Bytes that no stored picture exceeds."""
        if self.mode == "raw":
            return 3 * self.size**2
        return _JPEG_BYTES_PER_PIXEL * self.size**2 + _JPEG_HEADER_BYTES


def export_beton(
    request: BetonRequest, corpus: Corpus, view: View, split: str, rows: pa.Table, output: str
) -> tuple[BetonFacts, bool]:
    """Make ``output`` hold the rows, unless it does already.

    Args:
        request: size, mode, effort.
        corpus: where the samples are.
        view: that the rows belong to.
        split: train, val or all.
        rows: the samples, in order; their number becomes the field ``index``.
        output: path or URL of the file.

    Returns:
        What the sidecar says, and whether it was written now.

    Raises:
        UsageError: ffcv is missing, or there is no room.
        VerificationError: the file does not hold the samples after writing.
        PermanentError: ffcv's writer failed or hung.
    """
    require_ffcv()
    folder, slash, name = output.rpartition("/")
    storage = Storage.open(folder or slash or ".")
    facts = BetonFacts(
        sha256="",
        size=0,
        count=rows.num_rows,
        view=view.reference,
        view_digest=view.digest,
        split=split,
        image_size=request.size,
        fit=request.fit,
        mode=request.mode,
        jpeg_quality=request.jpeg_quality if request.mode == "jpg" else 0,
        pixels=request.pixels.digest(),
        page_size=page_size_for(request.largest),
    )
    found = _finished(storage, name, facts)
    if found is not None:
        return found, False
    with _scratch(storage, name) as scratch:
        _require_space(scratch, rows.num_rows, request)
        written = _write_verified(request, corpus, rows, facts, scratch / name)
        # The sidecar goes first and comes back last: in between the output is unfinished, never wrong.
        storage.remove(f"{name}.json")
        _move(storage, name, scratch / name)
        storage.publish(f"{name}.json", (json.dumps(dataclasses.asdict(written), indent=2) + "\n").encode())
    return written, True


def _write_verified(
    request: BetonRequest, corpus: Corpus, rows: pa.Table, facts: BetonFacts, target: Path
) -> BetonFacts:
    """Write the file, read it back, make it durable; its facts with size and sha256."""
    table = target.with_name("rows.parquet")
    pq.write_table(rows.select(["shard", "byte_offset", "byte_size", "quality"]), table)
    plan = BetonPlan(
        corpus=corpus.storage.url,
        rows=str(table),
        target=str(target),
        image_size=request.size,
        fit=request.fit,
        mode=request.mode,
        jpeg_quality=request.jpeg_quality,
        page_size=facts.page_size,
        workers=min(request.workers or os.cpu_count() or 1, rows.num_rows),
        cache=request.cache,
        pixels=dataclasses.asdict(request.pixels),
    )
    with progress(rows.num_rows, "export") as meter:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            meter.advance(count - done)
            done = count

        write_beton(plan, request.stall_s, advance)
    chosen = np.unique(np.linspace(0, rows.num_rows - 1, _COMPARED).astype(int)).tolist()
    expected = {
        number: _picture(request, corpus, row)
        for number, row in zip(chosen, rows.take(chosen).to_pylist(), strict=True)
    }
    read_back(target, rows["quality"].to_numpy().astype(np.float64), expected, request.mode)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return dataclasses.replace(facts, sha256=file_sha256(target), size=target.stat().st_size)


def _picture(request: BetonRequest, corpus: Corpus, row: Mapping[str, Any]) -> Picture:
    return fit_picture(decode(corpus.read_sample(row), request.pixels).array, request.size, request.fit)


def _finished(storage: Storage, name: str, facts: BetonFacts) -> BetonFacts | None:
    """The sidecar of an earlier export of the same content, whose file is there in its size."""
    if not (storage.exists(f"{name}.json") and storage.exists(name)):
        return None
    found = BetonFacts.from_json(storage.read(f"{name}.json"), storage.uri(f"{name}.json"))
    same = found.same_content(facts) and storage.stat(name).size == found.size
    return found if same else None


@contextmanager
def _scratch(storage: Storage, name: str) -> Iterator[Path]:
    """A folder beside the output where that is on this machine, so that a rename moves the file."""
    final = storage.local(name)
    if final is not None:
        final.parent.mkdir(parents=True, exist_ok=True)
    parent = final.parent if final is not None else None
    with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=parent) as folder:
        yield Path(folder)


def _require_space(scratch: Path, count: int, request: BetonRequest) -> None:
    """Raise UsageError where ``raw`` pixels cannot fit; what ``jpg`` needs is not known before."""
    needed, free = count * request.largest, shutil.disk_usage(scratch).free
    if request.mode == "raw" and free < needed:
        raise UsageError(
            f"The .beton needs {needed / 2**30:.1f} GiB, {scratch.parent} has {free / 2**30:.1f} GiB free.",
            "Choose another --output, a smaller --size or --mode jpg.",
        )


def _move(storage: Storage, name: str, source: Path) -> None:
    final = storage.local(name)
    if final is None:
        storage.publish(name, source)
        return
    os.replace(source, final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
