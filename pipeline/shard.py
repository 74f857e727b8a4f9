"""The verb ``shard``: pictures in folders, lists, tars or Parquet files become a sealed corpus."""

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iqpir.config import digest
from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy
from pipeline.commits.plan import Generation, extend_plan, planned_containers, read_generations
from pipeline.commits.records import Finished, finished
from pipeline.commits.retry import passing_failures
from pipeline.commits.seal import COUNTS, seal
from pipeline.commits.units import SchedulingConfig, run_units
from pipeline.sharding.crops import CropPolicy
from pipeline.sharding.decoding import DecodeConfig
from pipeline.sharding.picture_rules import RejectPolicy, ResizePolicy, TilePolicy
from pipeline.sharding.shard_unit import ShardWork
from pipeline.sources.find import SourceConfig, find_inputs
from pipeline.sources.http import HttpConfig
from pipeline.storage import Storage

STEP = "shard"
FORMAT_VERSION = 1
"""Part of every unit's id: raised when the same inputs and settings shall give other bytes."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """From pictures to the shards of a corpus."""

    input: str
    """Folder or URL prefix of the pictures (subfolders count); or a list of addresses, WebDataset tars, Parquet files,
    by name, folder or pattern such as shards/{000..127}.tar."""
    corpus: str
    """Folder or URL of the corpus; made, resumed, or extended by inputs that are new or changed."""
    collection: str = "images"
    """Name of these inputs within the corpus: part of every key and of the shards' names."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """How the input is understood."""
    http: HttpConfig = field(default_factory=HttpConfig)
    """How inputs with an http(s) address are downloaded."""
    retry: bool = False
    """Whether inputs are planned again that failed for a reason that passes, such as a server that was away."""
    prune: bool = False
    """Whether inputs of this collection that are planned and no longer in the input are removed: the next manifest
    leaves them out. Only for an --input that names all of the collection."""
    crop: CropPolicy = field(default_factory=CropPolicy)
    """How pictures are cut; by default they are kept whole, byte for byte."""
    tile: TilePolicy = field(default_factory=TilePolicy)
    """How large pictures are cut into tiles, stored as PNG."""
    resize: ResizePolicy = field(default_factory=ResizePolicy)
    """How large pictures are shrunk, before they are cut; stored as PNG."""
    reject: RejectPolicy = field(default_factory=RejectPolicy)
    """Which pictures are rejected."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Where pictures are decoded."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """What counts as a picture."""
    min_side: int = 32
    """Pictures with a shorter side, in pixels, are rejected."""
    unit_bytes: int = 512 * 2**20
    """A unit, hence a shard, ends before its inputs exceed this many bytes."""
    unit_samples: int = 10_000
    """A unit has at most this many inputs."""
    threads: int = 4
    """Inputs of a unit that are read and decoded at a time."""
    workers: int = 1
    """Units worked on at a time. 1: in this process, or on all of the cluster that RAY_ADDRESS names;
    0: in this process even then; more: that many on Ray, which is started here unless RAY_ADDRESS is set."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", self.collection):
            raise UsageError(
                f"collection {self.collection!r} is no name for shards.", "Use a-z, 0-9, _ and -, at most 64."
            )
        for name in ("min_side", "unit_bytes", "unit_samples", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is not positive.")
        if self.crop.size and self.tile.size:
            raise UsageError("Crops and tiles exclude each other.", "Give --crop.size or --tile.size.")
        if self.workers < 0:
            raise UsageError(f"workers {self.workers} is negative.")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the inputs that decides the bytes of a corpus."""
        pixels = json.loads(json.dumps(dataclasses.asdict(self.pixels)))
        policies = (("tile", self.tile), ("resize", self.resize), ("reject", self.reject))
        return {
            "format_version": FORMAT_VERSION,
            "crop": dataclasses.asdict(self.crop),
            "pixels": {**pixels, "digest": self.pixels.digest()},
            "min_side": self.min_side,
            "unit_bytes": self.unit_bytes,
            "unit_samples": self.unit_samples,
            # Only where they do anything: a corpus without them keeps the fingerprint it had before they existed.
            **{name: dataclasses.asdict(policy) for name, policy in policies if policy != type(policy)()},
        }


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What the corpus holds now; ``inputs = success + rejected + failed``."""

    corpus: str
    inputs: int
    success: int
    rejected: int
    failed: int
    samples: int
    statuses: dict[str, int]
    """Inputs by status."""
    ignored: int
    """Files, members and lines of the input that are no inputs."""
    units: int
    skipped_units: int
    """Units that were done before."""
    version: int
    manifest: str
    """sha256 of the sealed manifest."""
    seconds: float


def shard(config: ShardConfig) -> ShardResult:
    """Cut a folder or bucket of pictures, a list, tars or Parquet files into the shards of a corpus.

    Every input ends in exactly one shard member (or in crops), or in one row that says why not. Stop it,
    lose workers, run it again: the same command goes on, and the result is the same bytes.

    Raises:
        UsageError: nothing to read, nowhere to write, a corpus of another configuration: nothing is written.
        IncompleteError: units are left.
        PermanentError: no input gave a sample, or a unit cannot succeed.
    """
    began = time.monotonic()
    storage = Storage.open(config.corpus)

    def planned(url: str, reading: Mapping[str, str]) -> Mapping[str, str]:
        if config.prune:  # what is gone from a file shows only in all of it
            return {}
        return planned_containers(read_generations(storage), config.collection, url, reading)

    listing = find_inputs(config.input, config.source, planned)
    fingerprint = digest(config.settings)
    known = finished(storage, STEP, fingerprint)
    again: frozenset[str] = frozenset()
    if config.retry:
        again = passing_failures(storage, read_generations(storage), known, config.collection)
    generations = extend_plan(storage, listing, config.collection, config.settings, config.prune, again)
    work = ShardWork(
        corpus=storage,
        pixels=config.pixels,
        min_side=config.min_side,
        threads=config.threads,
        crop=config.crop,
        tile=config.tile,
        resize=config.resize,
        reject=config.reject,
        decode=config.decode,
        http=config.http,
    )
    total = sum(item.facts["units"] for item in generations)
    left = itertools.chain.from_iterable(item.units(skip=known) for item in generations)
    report = run_units(
        storage,
        STEP,
        fingerprint,
        left,
        work,
        total=total - _count_done(generations, known),
        scheduling=SchedulingConfig(workers=config.workers),
        known=known,
    )
    report.require_complete(STEP)
    manifest = seal(storage, generations, finished(storage, STEP, fingerprint) if report.done else known)
    facts = manifest.facts
    return ShardResult(
        corpus=storage.url,
        **{name: int(facts[name]) for name in COUNTS},
        statuses=dict(facts["statuses"]),
        ignored=listing.ignored,
        units=total,
        skipped_units=total - report.done,
        version=manifest.version,
        manifest=manifest.digest,
        seconds=round(time.monotonic() - began, 3),
    )


def _count_done(generations: Sequence[Generation], known: Finished) -> int:
    return sum(unit_id in known for item in generations for unit_id in item.unit_ids())
