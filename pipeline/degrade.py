"""Write degraded pictures beside the good ones they are made from, with the parameters that made them.

With ``key``: what one sample was in one epoch of a training. Without: the fixed pairs of a view that
evaluation uses. Both are functions of the seed, so they can be made again bit for bit.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from iqpir.config import NetworkConfig, digest, preset
from iqpir.degradation.parameters import (
    DegradationConfig,
    DegradationParameters,
    parameters_for_key,
    sample_parameters,
)
from iqpir.degradation.reference import degrade as degrade_picture
from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy, decode, encode_png
from iqpir.stages.stage3 import Stage3Config
from pipeline.command import from_dict
from pipeline.corpus import Corpus, to_parquet
from pipeline.progress import progress
from pipeline.stage2 import degradation_for
from pipeline.stage3 import PhasedDegradation
from pipeline.storage import Storage
from pipeline.training.feed import FeedConfig, Fit, Samples, fit_picture
from pipeline.view import View, read_view

PARAMETERS = "parameters.parquet"
RECORD = "pairs.json"
_NESTED = ("scene", "jitter")
_OPTIONAL = (*_NESTED, "shot")
"""Columns that only some degradations have, and then perhaps not in every row."""


@dataclass(frozen=True, kw_only=True)
class DegradeConfig:
    """Which samples are degraded, and how."""

    corpus: str
    """Folder or URL of the corpus."""
    output: str
    """Folder or URL for the pictures and their parameters."""
    view: str = ""
    """View with the samples: name or name@v0001; that of ``run`` by default."""
    run: str = ""
    """Folder of a training: view, size, degradation, seed, fit and flips are its own."""
    key: str = ""
    """Replay this sample of the train split; empty: the fixed pairs of ``split``."""
    epoch: int = 0
    """With ``key``: how many times the training had seen the sample before."""
    seed: int = 2603
    """Of the training, or of the evaluation."""
    degradation: str = "faces"
    """Preset of the degradation, scaled to the network's size."""
    preset: str = "iqpir512"
    """Network whose size the pictures get."""
    split: Literal["train", "val"] = "val"
    """Without ``key``: rows of the view that are written."""
    samples: int = 0
    """Without ``key``: at most so many rows, the first; 0: all."""
    fit: Fit = "exact"
    """How a picture becomes the network's size; as in training."""
    flip: bool = True
    """With ``key``: whether the training mirrors samples."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""

    def __post_init__(self) -> None:
        if not self.view and not self.run:
            raise UsageError("Neither view nor run is given.", "Name the view, or the training to replay.")
        if self.run and not self.key:
            raise UsageError("run replays a training and needs --key.", "Without a key, give --view.")
        if self.epoch < 0 or self.samples < 0:
            raise UsageError(f"epoch {self.epoch} or samples {self.samples} is negative.")


@dataclass(frozen=True)
class DegradeResult:
    """What was written."""

    output: str
    view: str
    pairs: int
    files: list[str]
    """The pictures of a replay; the record and the Parquet file of a view's pairs."""
    digest: str
    """Changes with the samples, the degradation, the seed or the size."""


@dataclass(frozen=True)
class Recipe:
    """What decides a pair, from the configuration or a run's record."""

    view: str
    network: NetworkConfig
    degradation: DegradationConfig
    seed: int
    fit: Fit
    flip: bool
    schedule: PhasedDegradation | None = None
    """Where it changes during a training, as in stage 3."""
    shards_per_block: int = 0


def degrade(config: DegradeConfig) -> DegradeResult:
    """Replay one sample's degradation (``--key``), or write a view's fixed pairs.

    Raises:
        UsageError: no such view, run, key or preset; a picture does not fit.
    """
    corpus = Corpus(config.corpus)
    recipe = _recipe(config)
    view = read_view(corpus, recipe.view)
    target = Storage.open(config.output)
    if config.key:
        return _replay(config, recipe, view, target)
    return _pairs(config, recipe, corpus, view, target)


def _recipe(config: DegradeConfig) -> Recipe:
    if not config.run:
        network = preset(config.preset)
        return Recipe(
            config.view,
            network,
            degradation_for(config.degradation, network.image_size),
            config.seed,
            config.fit,
            config.flip,
        )
    storage = Storage.open(config.run)
    if not storage.exists("run.json"):
        raise UsageError(f"{config.run} has no run.json.", "Name the folder of a training.")
    run: dict[str, Any] = json.loads(storage.read("run.json"))
    if "degradation" not in run["training"]:
        raise UsageError(f"The run {config.run} ({run['stage']}) degrades nothing.", "Name one of stage 2 or 3.")
    if "pairs" in run["lineage"]:
        raise UsageError(f"The run {config.run} was trained on pairs.", "Its degraded pictures are a corpus already.")
    network = NetworkConfig.from_dict(run["network"])
    strong = degradation_for(run["training"]["degradation"], network.image_size)
    return Recipe(
        config.view or run["lineage"]["view_name"],
        network,
        strong,
        int(run["training"]["seed"]),
        run["fit"],
        bool(run["flip"]),
        _phases(run["training"], strong, network.image_size) if run["stage"] == "stage3" else None,
        int(run.get("shards_per_block", 0)),
    )


def _phases(training: dict[str, Any], strong: DegradationConfig, image_size: int) -> PhasedDegradation:
    """Stage 3 degrades lightly in steps with fidelity."""
    light = degradation_for(training["light_degradation"], image_size)
    return PhasedDegradation(strong, light, from_dict(Stage3Config, training["stage"]), training["batch_size"])


def _replay(config: DegradeConfig, recipe: Recipe, view: View, target: Storage) -> DegradeResult:
    """The sample exactly as the feed gave it: same crop, same mirroring, same degradation."""
    rows = view.split("train")
    keys = rows["key"].to_pylist()
    if config.key not in keys:
        raise UsageError(
            f"The train split of view {view.reference} has no sample {config.key}.",
            f"It has {len(keys)}; the first is {keys[0]}.",
        )
    index = keys.index(config.key)
    feed = FeedConfig(fit=recipe.fit, flip=recipe.flip, pixels=config.pixels, shards_per_block=recipe.shards_per_block)
    samples = Samples(config.corpus, rows, feed, recipe.network, recipe.degradation, None, recipe.seed)
    degradation = recipe.degradation
    if recipe.schedule is not None:
        degradation = recipe.schedule(samples.position(config.epoch, index))
    item = samples.prepare(samples.hq(index), config.epoch, index, degradation)
    if item.lq is None:
        raise UsageError("The recipe degrades nothing.")
    facts = {
        "key": config.key,
        "epoch": config.epoch,
        "index": index,
        "seed": recipe.seed,
        "flipped": item.flipped,
        "view": view.reference,
        "view_digest": view.digest,
        "degradation": degradation.to_dict(),
        "parameters": sample_parameters(degradation, recipe.seed, config.epoch, index).to_dict(),
    }
    stem = f"{config.key}-e{config.epoch}"
    names = [f"{stem}.hq.png", f"{stem}.lq.png", f"{stem}.json"]
    for name, data in zip(names, (encode_png(item.hq), encode_png(item.lq), _json(facts)), strict=True):
        target.publish(name, data)
    return DegradeResult(target.url, view.reference, 1, [target.uri(name) for name in names], digest(facts))


def _pairs(config: DegradeConfig, recipe: Recipe, corpus: Corpus, view: View, target: Storage) -> DegradeResult:
    """``hq/<key>.png`` and ``lq/<key>.png`` of each row, then the parameters, then the record."""
    rows = view.split(config.split)
    rows = rows.slice(0, config.samples) if config.samples else rows
    table = _parameters_table(rows["key"].to_pylist(), recipe)
    identity = {
        "view": view.reference,
        "view_digest": view.digest,
        "split": config.split,
        "samples": rows.num_rows,
        "image_size": recipe.network.image_size,
        "fit": recipe.fit,
        "seed": recipe.seed,
        "degradation": recipe.degradation.to_dict(),
        "pixels": config.pixels.digest(),
    }
    with progress(rows.num_rows, "degrade") as meter:
        for row, values in zip(rows.to_pylist(), table.to_pylist(), strict=True):
            picture = decode(corpus.read_sample(row), config.pixels).array
            hq = fit_picture(picture, recipe.network.image_size, recipe.fit)
            parameters = parameters_of(values)
            target.publish(f"hq/{row['key']}.png", encode_png(hq))
            target.publish(f"lq/{row['key']}.png", encode_png(degrade_picture(hq, parameters)))
            meter.advance()
    target.publish(PARAMETERS, to_parquet(table))
    target.publish(RECORD, _json({**identity, "digest": digest(identity)}))
    files = [target.uri(PARAMETERS), target.uri(RECORD)]
    return DegradeResult(target.url, view.reference, rows.num_rows, files, digest(identity))


def _parameters_table(keys: list[str], recipe: Recipe) -> pa.Table:
    """key and every field of ``DegradationParameters`` that the degradation uses, a row each key."""
    rows = [{"key": key, **parameters_for_key(recipe.degradation, recipe.seed, key).to_dict()} for key in keys]
    for row in rows:
        # A scene and a jitter have parts that differ by kind: JSON in one column each.
        row.update({name: json.dumps(row[name], sort_keys=True) for name in _NESTED if name in row})
    kinds = {"kernel": pa.string(), "kernel_size": pa.int32(), "noise_seed": pa.int64(), "jpeg": pa.int32()}
    kinds |= {"colour_shift": pa.list_(pa.float64()), "gray": pa.bool_(), "scene": pa.string(), "jitter": pa.string()}
    used = {name for row in rows for name in row}
    fields = [field.name for field in dataclasses.fields(DegradationParameters) if field.name in used]
    schema = pa.schema([("key", pa.string()), *((name, kinds.get(name, pa.float64())) for name in fields)])
    return pa.Table.from_pylist(rows, schema=schema)


def parameters_of(row: dict[str, Any]) -> DegradationParameters:
    """The parameters in one row of ``parameters.parquet``."""
    values = {name: value for name, value in row.items() if name != "key" and not (name in _OPTIONAL and value is None)}
    return DegradationParameters.from_dict(
        {name: json.loads(value) if name in _NESTED else value for name, value in values.items()}
    )


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
