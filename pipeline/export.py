"""Write a view for other readers: an ffcv ``.beton``, tars of its own, or plain files.

What is exported says in a record written last which view it came from; without that record it is
unfinished. The same command again finishes it, or finds it done.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy
from pipeline.corpus import Corpus
from pipeline.exports.balance import deal
from pipeline.exports.beton import Mode, Picture
from pipeline.exports.export_beton import BetonRequest, export_beton
from pipeline.exports.files import RECORD, export_files, export_tars
from pipeline.exports.indexes import Index, write_indexes
from pipeline.storage import Storage
from pipeline.training.feed import Fit, fit_picture
from pipeline.view import View, read_view

_ONLY_FOR = {
    **dict.fromkeys(("mode", "jpeg_quality", "workers", "stall_s"), "ffcv"),
    **dict.fromkeys(("shard_bytes", "balance", "indexes"), "tar"),
}
"""Fields that one format alone looks at."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is exported, in which form, to where."""

    corpus: str
    """Folder or URL of the corpus."""
    view: str
    """View that is exported: name or name@v0001."""
    output: str
    """File that ends with .beton (ffcv), or folder (tar, files); path or URL."""
    format: Literal["ffcv", "tar", "files"] = "ffcv"
    """``ffcv``: one .beton for training; ``tar``: webdataset tars; ``files``: one file a picture."""
    split: Literal["train", "val", "all"] = "train"
    """Rows of the view."""
    size: int = 0
    """Side of the exported pictures in pixels; 0 (tar, files): the original bytes."""
    fit: Fit = "exact"
    """How a picture becomes ``size``: must be it already; centre square, resized; centre crop."""
    mode: Mode = "raw"
    """ffcv: ``raw`` pixels, or lossy ``jpg``."""
    jpeg_quality: int = 95
    """ffcv with mode jpg: JPEG quality, 1 to 100."""
    shard_bytes: int = 512 * 2**20
    """tar: bytes of pictures after which the next tar begins; with ``balance`` about the size of each."""
    balance: bool = False
    """tar: deal the samples so that every tar has the view's distribution of quality, and as many samples and bytes
    as the others; else the view's order is kept."""
    indexes: list[Index] = field(default_factory=list)
    """tar: indexes for other loaders, made from the tars, for a finished export too: ``dali`` (one .idx a tar),
    ``wids`` (wids.json)."""
    workers: int = 0
    """ffcv: processes that decode; 0: one a CPU."""
    stall_s: float = 300.0
    """ffcv: seconds without a new sample after which its writer is stopped."""
    cache: str = ""
    """Folder for whole shards of a remote corpus; a folder of the system's by default."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""

    def __post_init__(self) -> None:
        if self.format == "ffcv" and not self.output.endswith(".beton"):
            raise UsageError(f"output {self.output} is no .beton.", "Name a file, such as train.beton.")
        if self.format == "ffcv" and self.size < 1:
            raise UsageError("A .beton needs pictures of one size.", "Give --size, the network's image_size.")
        self._require_used()
        if self.size < 0 or self.shard_bytes < 1 or self.workers < 0 or self.stall_s <= 0:
            raise UsageError("size and workers must not be negative, shard_bytes and stall_s positive.")
        if not 1 <= self.jpeg_quality <= 100:
            raise UsageError(f"jpeg_quality {self.jpeg_quality} is outside 1..100.")

    def _require_used(self) -> None:
        """Nothing is set that this export would not look at."""
        plain = {entry.name: entry.default for entry in dataclasses.fields(self)}
        set_here = [name for name in _ONLY_FOR if getattr(self, name) != plain[name] and getattr(self, name) != []]
        for name in set_here:
            if self.format != _ONLY_FOR[name]:
                raise UsageError(f"{name} is for {_ONLY_FOR[name]}, not for {self.format}.", "Leave it out.")
        if self.mode != "jpg" and "jpeg_quality" in set_here:
            raise UsageError(f"jpeg_quality is for mode jpg, not for {self.mode}.", "Leave it out.")
        if not self.size and self.fit != plain["fit"]:
            raise UsageError(f"fit {self.fit} has no size to fit.", "Give --size, or leave it out.")


@dataclass(frozen=True)
class ExportResult:
    """What lies at the output now."""

    output: str
    format: str
    view: str
    view_digest: str
    count: int
    bytes: int
    sha256: str
    """Of the .beton, or of the record that lists every file with its own."""
    written: bool
    """False: an earlier run had finished it."""
    indexes: list[str] = field(default_factory=list)
    """Addresses of the indexes that were asked for."""


def export(config: ExportConfig) -> ExportResult:
    """Write a view as a .beton (ffcv), tars or files.

    Raises:
        UsageError: no such view; a picture does not fit; ffcv is missing; the output holds another export.
        VerificationError: what was written is not what the view says.
        PermanentError: ffcv's writer failed or hung.
    """
    corpus = Corpus(config.corpus)
    view = read_view(corpus, config.view)
    rows = view.table if config.split == "all" else view.split(config.split)
    check_sizes(rows, config.size, config.fit)
    if config.format == "ffcv":
        return _export_beton(config, corpus, view, rows)
    return _export_folder(config, corpus, view, rows)


def _export_beton(config: ExportConfig, corpus: Corpus, view: View, rows: pa.Table) -> ExportResult:
    request = BetonRequest(
        size=config.size,
        fit=config.fit,
        mode=config.mode,
        jpeg_quality=config.jpeg_quality,
        workers=config.workers,
        stall_s=config.stall_s,
        cache=config.cache,
        pixels=config.pixels,
    )
    facts, written = export_beton(request, corpus, view, config.split, rows, config.output)
    return ExportResult(
        output=config.output,
        format=config.format,
        view=view.reference,
        view_digest=view.digest,
        count=facts.count,
        bytes=facts.size,
        sha256=facts.sha256,
        written=written,
    )


def _export_folder(config: ExportConfig, corpus: Corpus, view: View, rows: pa.Table) -> ExportResult:
    identity: dict[str, Any] = {
        "format": config.format,
        "view": view.reference,
        "view_digest": view.digest,
        "split": config.split,
        "size": config.size,
        "fit": config.fit,
        "pixels": config.pixels.digest(),
        "shard_bytes": config.shard_bytes,
    }
    shares: list[int] = []
    if config.balance:
        identity["balance"] = True
        rows, shares = deal(rows, config.shard_bytes)

    def fitted(picture: Picture) -> Picture:
        return fit_picture(picture, config.size, config.fit)

    target = Storage.open(config.output)
    wanted = fitted if config.size else None
    if config.format == "tar":
        done = export_tars(corpus, rows, target, identity, config.pixels, wanted, config.cache, shares)
    else:
        done = export_files(corpus, rows, target, identity, config.pixels, wanted, config.cache)
    return ExportResult(
        output=target.url,
        format=config.format,
        view=view.reference,
        view_digest=view.digest,
        count=rows.num_rows,
        bytes=done.bytes,
        sha256=done.sha256,
        written=done.written,
        indexes=write_indexes(target, RECORD, config.indexes),
    )


def check_sizes(rows: pa.Table, size: int, fit: Fit) -> None:
    """Find pictures that do not fit before anything is written.

    Raises:
        UsageError: naming how many and the first.
    """
    if size == 0 or fit == "resize":
        return
    width, height = rows["width"], rows["height"]
    compare = pc.not_equal if fit == "exact" else pc.less
    wrong = rows.filter(pc.or_(compare(width, size), compare(height, size)))
    if wrong.num_rows:
        first = wrong.slice(0, 1).to_pylist()[0]
        raise UsageError(
            f"{wrong.num_rows} of {rows.num_rows} samples do not fit {size}x{size} by {fit}; the first is "
            f"{first['key']}, {first['width']}x{first['height']}.",
            "Choose --fit resize or crop, another --size, or a view by width and height.",
        )
