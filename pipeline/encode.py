"""Encode a corpus: the frozen stage 1 turns each sample, and its mirror image, into code numbers, once.

Codes belong to the stage-1 weights that made them (their digest is the folder's name): stage 2 asks for the
codes of its own stage 1 and cannot get others.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from iqpir.config import digest
from iqpir.errors import IncompleteError, UsageError, VerificationError
from iqpir.networks.restoration_network import RestorationNetwork, build
from iqpir.pixels import PictureError, PixelPolicy, decode
from iqpir.training import checkpoint
from pipeline.commits.manifest import ManifestUnit
from pipeline.commits.records import finished
from pipeline.commits.units import SchedulingConfig, run_units
from pipeline.corpus import Corpus
from pipeline.documents import publish_table
from pipeline.layout import codes_path, from_parquet, sha256_hex
from pipeline.storage import Storage
from pipeline.training.checkpoints import fetch_checkpoint, load_stage1
from pipeline.training.feed import Fit, Picture, fit_picture, pictures_to_tensor

STEP = "encode"
CODES = pa.schema([("key", pa.string()), ("status", pa.string()), ("codes", pa.binary())])
"""``codes``: int16 little-endian [2, C, h, w] (as it is, mirrored; common, HQ+); null without success."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What is encoded, by which stage 1."""

    corpus: str
    """Folder or URL of the corpus."""
    stage1: str
    """Stage-1 checkpoint, or its run's folder (the newest checkpoint)."""
    fit: Fit = "exact"
    """How a sample becomes the network's size: ``exact`` or ``resize``, as stage 2 will feed it."""
    batch_size: int = 32
    """Pictures at a time."""
    device: str = "cpu"
    """Where the encoder runs: cpu or cuda."""
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    """Where units run, and how many at a time."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""

    def __post_init__(self) -> None:
        if self.fit == "crop":
            raise UsageError(
                "Random crops have no fixed codes to cache.",
                "Use fit resize, or train stage 2 with --codes online.",
            )
        if self.batch_size < 1:
            raise UsageError(f"batch_size {self.batch_size} is no positive number.")


@dataclass(frozen=True)
class EncodeResult:
    """Which codes there are now."""

    corpus: str
    stage1_digest: str
    fingerprint: str
    units: int
    skipped_units: int
    samples: int


def encode(config: EncodeConfig) -> EncodeResult:
    """Turn every sample of a corpus into the code numbers of a stage-1 checkpoint.

    Raises:
        UsageError: no corpus, no checkpoint of stage 1.
        IncompleteError: units are left; the same command goes on.
    """
    corpus = Corpus(config.corpus)
    manifest = corpus.manifest()
    found = load_stage1(config.stage1)
    stage1 = str(found.metadata["stage1_digest"])
    fingerprint = codes_fingerprint(stage1, config.fit, config.pixels)
    work = _Encoder(config, stage1)
    report = run_units(
        corpus.storage,
        STEP,
        fingerprint,
        manifest.units,
        work,
        total=len(manifest.units),
        scheduling=config.scheduling,
    )
    report.require_complete(STEP)
    return EncodeResult(corpus.storage.url, stage1, fingerprint, report.total, report.skipped, manifest.samples)


def codes_fingerprint(stage1_digest: str, fit: Fit, pixels: PixelPolicy) -> str:
    """12 hex digits for all that decides the codes of a sample."""
    return digest({"stage1": stage1_digest, "fit": fit, "pixels": pixels.digest()})


@dataclass(frozen=True)
class _Encoder:
    """Work on one unit; travels to Ray workers, where each process loads the network once."""

    config: EncodeConfig
    stage1: str

    def __call__(self, unit: ManifestUnit) -> dict[str, Any]:
        corpus = Corpus(self.config.corpus)
        rows = corpus.unit_samples(unit, ["key", "shard", "byte_offset", "byte_size", "sha256"]).to_pylist()
        network = _network(self.config.stage1, self.stage1, self.config.device)
        results: list[dict[str, Any]] = []
        for start in range(0, len(rows), self.config.batch_size):
            results += self._batch(corpus, network, rows[start : start + self.config.batch_size])
        table = pa.Table.from_pylist(results, schema=CODES)
        metadata = {"stage1_digest": self.stage1, "network": network.config.digest(), "fit": self.config.fit}
        reference = publish_table(
            corpus.storage, table, functools.partial(codes_path, self.stage1[:16], unit.ordinal), metadata
        )
        return {"objects": [reference.to_dict()]}

    def _batch(self, corpus: Corpus, network: RestorationNetwork, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outcomes = [self._picture(corpus, row, network.config.image_size) for row in rows]
        pictures = [picture for picture, _ in outcomes if picture is not None]
        codes = iter(encode_pictures(network, pictures, self.config.device) if pictures else ())
        return [
            {
                "key": row["key"],
                "status": status,
                "codes": None if picture is None else next(codes).astype("<i2").tobytes(),
            }
            for row, (picture, status) in zip(rows, outcomes, strict=True)
        ]

    def _picture(self, corpus: Corpus, row: dict[str, Any], size: int) -> tuple[Picture | None, str]:
        try:
            picture = decode(corpus.read_sample(row), self.config.pixels).array
            return fit_picture(picture, size, self.config.fit), "success"
        except PictureError as error:
            return None, f"failed_{error.code}"
        except UsageError:
            return None, "rejected_size"


@functools.lru_cache(maxsize=1)
def _network(url: str, stage1: str, device: str) -> RestorationNetwork:
    found = checkpoint.load(fetch_checkpoint(url))
    if found.metadata["stage1_digest"] != stage1:
        raise VerificationError(
            f"{url} changed while it was used: {found.metadata['stage1_digest'][:12]} instead of {stage1[:12]}.",
            "Name one checkpoint directory instead of a run that is still training.",
        )
    network = build(found.network_config)
    network.load_autoencoder(found.model)
    return network.to(device).eval()


def encode_pictures(network: RestorationNetwork, pictures: list[Picture], device: str = "cpu") -> NDArray[np.int16]:
    """Codes of uint8 RGB HWC pictures of the network's size: int16 [N, 2, C, h, w], as they are and mirrored."""
    batch = pictures_to_tensor(pictures).to(device)
    both = [network.encode_codes(batch), network.encode_codes(batch.flip(-1))]
    return torch.stack(both, dim=1).cpu().numpy().astype(np.int16)


def codes_digest(corpus: Corpus, fingerprint: str, stage1_digest: str) -> str:
    """sha256 over the code tables of the sealed corpus: what a training on them is bound to.

    Raises:
        UsageError: this stage 1 has no codes here; the message says whether others have.
        IncompleteError: some units are not encoded.
    """
    units = corpus.manifest().units
    done = finished(corpus.storage, STEP, fingerprint)
    missing = [unit for unit in units if unit.unit_id not in done]
    if len(missing) == len(units):
        others = sorted({entry.path.split("/")[1] for entry in corpus.storage.list("codes")})
        raise UsageError(
            f"The corpus {corpus.storage.url} has no codes of stage 1 {stage1_digest[:16]} with this feed.fit"
            + (f"; it has codes of {', '.join(others)}." if others else "."),
            "Run jobs/encode.py with this stage 1 and the same fit, or train with --codes online.",
        )
    if missing:
        raise IncompleteError(f"{len(missing)} of {len(units)} units are not encoded.", "Run jobs/encode.py again.")
    records = done.load([unit.unit_id for unit in units])
    return digest([records[unit.unit_id]["objects"] for unit in units], 64)


def read_codes(corpus: Corpus, fingerprint: str, rows: pa.Table, shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Codes of the samples of ``rows``: int16 [N, 2, C, h, w].

    Args:
        corpus: the sealed corpus.
        fingerprint: ``codes_fingerprint`` of the stage 1.
        rows: has ``key``.
        shape: (C, h, w) of the network.

    Raises:
        UsageError: a row has no codes (its picture has another size).
        VerificationError: a table has another digest than its commit record, or codes of another shape.
    """
    units = corpus.manifest().units
    records = finished(corpus.storage, STEP, fingerprint).load([unit.unit_id for unit in units])
    tables = [_table(corpus.storage, record["objects"][0]) for record in records.values()]
    table = pa.concat_tables(tables)
    found = pc.index_in(rows["key"], value_set=table["key"].combine_chunks())
    if found.null_count:
        raise VerificationError(f"{found.null_count} samples of the view have no row among the codes.")
    codes = table["codes"].take(found).combine_chunks()
    if codes.null_count:
        raise UsageError(
            f"{codes.null_count} samples of the view have no codes: their size is not the network's.",
            "Curate by width and height, or encode and train with fit resize.",
        )
    size = 2 * int(np.prod(shape)) * 2
    if set(pc.unique(pc.binary_length(codes)).to_pylist()) != {size}:
        raise VerificationError(f"Codes are not of shape {(2, *shape)}.", "Encode with this stage 1 again.")
    data = b"".join(codes.to_pylist())
    return np.frombuffer(data, dtype="<i2").astype(np.int16).reshape(rows.num_rows, 2, *shape)


def _table(storage: Storage, reference: dict[str, Any]) -> pa.Table:
    data = storage.read(reference["path"])
    if sha256_hex(data) != reference["sha256"]:
        raise VerificationError(f"{storage.uri(reference['path'])} is not what its commit record says.")
    return from_parquet(data)
