"""Evaluate a checkpoint on held-back pictures: quality, fidelity, and whether the dial does what it says.

The pairs are fixed: the degradation of a picture is a function of the seed and the picture's key, so two
models that are evaluated with the same digest saw the same pictures.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import spearmanr

from iqpir.config import digest
from iqpir.degradation.parameters import (
    DegradationConfig,
    degradation_preset,
    parameters_for_key,
    scaled,
)
from iqpir.degradation.reference import degrade
from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import PixelPolicy, decode, encode_png
from iqpir.restorer import Restorer
from iqpir.training import checkpoint
from pipeline.corpus import Corpus
from pipeline.judging.continuous import restored_without_codes
from pipeline.judging.judge import Judge, Measured
from pipeline.judging.outside import held_out, outside_figures
from pipeline.progress import progress
from pipeline.scoring.calibration import read_calibration
from pipeline.scoring.drift import require_current_metrics
from pipeline.storage import Storage
from pipeline.tracking.evaluations import log_evaluation
from pipeline.tracking.runs import RunHandle, find_run, reachable, tracking_location
from pipeline.training.checkpoints import fetch_checkpoint
from pipeline.training.feed import Fit, Picture, fit_picture
from pipeline.training.pairs import PairsConfig, find_pairs
from pipeline.training.run_folder import mlflow_run_of, run_of
from pipeline.training.shard_cache import ShardCache
from pipeline.view import View, read_view

log = logging.getLogger(__name__)

DIAL = tuple(round(0.05 + 0.1 * step, 2) for step in range(10))
"""Requested qualities of the dial curve: 0.05, 0.15 ... 0.95."""
EVALUATION, MONTAGE = "evaluation.json", "montage.png"
EXAMPLES = 8
"""Pictures shown in the montage and kept as files."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, on which held-back pictures, by which metrics."""

    corpus: str
    """Folder or URL of the corpus."""
    view: str
    """View whose ``val`` split is restored: name or name@v0001."""
    checkpoint: str
    """Checkpoint directory, or a run's folder (its newest checkpoint)."""
    output: str = ""
    """Folder or URL for evaluation.json and montage.png; the checkpoint's run by default."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of the measured quality; those of the view's calibration by default."""
    outside: list[str] = field(default_factory=list)
    """Metrics that judge from outside the loss; by default those of ``metrics`` that the training did not have in its
    prior, else rank_judge."""
    weights_uri: str = ""
    """Folder or URL with weight files of the metrics, as in jobs/score.py."""
    degradation: str = ""
    """Preset of the degradation; the one of the checkpoint's training by default."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Degraded pictures that exist, in place of ``degradation``."""
    dial: tuple[float, ...] = DIAL
    """Requested qualities of the dial curve."""
    further: tuple[float, ...] = ()
    """Requested qualities that are measured beside those of the curve."""
    quality: float = 0.95
    """Requested quality of the restored pictures in the headline figures."""
    fidelity: tuple[float, ...] = (0.0,)
    """Weights of the fidelity modules (w), which need a model of stage 3. The first holds for all figures; at the
    requested ``quality`` the others are measured beside it."""
    samples: int = 128
    """At most so many pictures, the first by the hash in their key."""
    fit: Fit = "exact"
    """How a picture becomes the network's size; as in training."""
    latents: Literal["codes", "continuous"] = "codes"
    """``continuous`` decodes the conditioned latent itself, without codebooks: for comparison only."""
    seed: int = 2603
    """Of the degradations."""
    device: str = "cpu"
    """Where the network and the metrics run."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""
    track: bool = True
    """Log to MLflow, below the run of the training that the checkpoint's folder names."""
    tracking_uri: str = ""
    """MLflow server or database of that run; $MLFLOW_TRACKING_URI or the workspace's mlflow.db by default."""

    def __post_init__(self) -> None:
        if len(self.dial) < 3 or not all(0 <= value <= 1 for value in (*self.dial, *self.further, self.quality)):
            raise UsageError("dial needs three or more values; they, further and quality must be in [0, 1].")
        if not self.fidelity or not all(0 <= value <= 1 for value in self.fidelity):
            raise UsageError(f"fidelity {self.fidelity} needs one or more values in [0, 1].")
        if self.samples < 1:
            raise UsageError(f"samples {self.samples} is no positive number.")


@dataclass(frozen=True)
class EvaluateResult:
    """What evaluation.json holds, and where it is."""

    digest: str
    quality: dict[str, float]
    dial: list[list[float]]
    dial_spearman: float
    dial_range: float
    psnr: dict[str, float]
    ssim: dict[str, float]
    metrics: dict[str, dict[str, Any]]
    samples: int
    checkpoint: str
    lineage: dict[str, str]
    output: str
    outside: dict[str, float]
    """Mean calibrated score over ``outside_metrics`` of lq, hq and restored; Spearman and range of the dial by it."""
    outside_metrics: list[str]
    """None of them was in the loss."""
    curve: dict[str, list[float]] = field(default_factory=dict)
    """PSNR and SSIM at each setting of the dial."""
    further: list[dict[str, float]] = field(default_factory=list)
    """Requested, and measured quality, PSNR and SSIM, of each of ``EvaluateConfig.further``."""
    fidelity: list[dict[str, float]] = field(default_factory=list)
    """Each of ``EvaluateConfig.fidelity``, and quality, PSNR and SSIM with it; one is not listed."""
    high_quality: dict[str, float] = field(default_factory=dict)
    """Of the pictures above the HQ+ threshold: how many, and quality, PSNR and SSIM of the restored ones."""


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Restore held-back pictures at every dial setting and measure quality and fidelity.

    Raises:
        UsageError: no view, no val split, no checkpoint, an unknown metric, or none that was not in the loss; MLflow
            has no such run.
        VerificationError: the checkpoint was trained with labels of another calibration.
    """
    corpus = Corpus(config.corpus)
    view = read_view(corpus, config.view)
    directory = fetch_checkpoint(config.checkpoint)
    found = checkpoint.load(directory)
    _require_same_calibration(found.metadata["lineage"], view)
    run = _training_run(config) if config.track else None
    output = Storage.open(config.output or f"{run_of(config.checkpoint)}/evaluation")
    result = _evaluated(config, corpus, view, directory, output)
    if run is not None:
        key = f"{result.digest}@{found.metadata['weights_digest']}"
        values, params = dataclasses.asdict(result), dataclasses.asdict(config)
        log_evaluation(run, key, values, output.read(MONTAGE), params, int(found.metadata.get("step", 0)))
    return result


def _training_run(config: EvaluateConfig) -> RunHandle | None:
    """The MLflow run of the training, which answers; None where the checkpoint's folder names none.

    Raises:
        UsageError: no such run, or no server.
    """
    run = mlflow_run_of(config.checkpoint)
    if not run:
        log.info("%s names no MLflow run: the evaluation will be in no server", run_of(config.checkpoint))
        return None
    uri = tracking_location(config.tracking_uri)
    reachable(uri)
    try:
        return find_run(uri, "", run)
    except UsageError as error:
        raise UsageError(
            f"{error.what} It is the training's.", "Name its server: --tracking-uri; or give --no-track."
        ) from error


def _evaluated(config: EvaluateConfig, corpus: Corpus, view: View, directory: Path, output: Storage) -> EvaluateResult:
    """Restore, measure and write; or what is there already."""
    found = checkpoint.load(directory)
    calibration = read_calibration(corpus, view.facts["calibration_name"])
    metrics = config.metrics or list(calibration.metrics)
    judges = held_out(calibration, metrics, _prior(found), config.outside)
    rows = sorted(view.split("val").to_pylist(), key=_by_key)[: config.samples]
    degraded = _degraded(config, found, corpus, [row["key"] for row in rows])
    identity = {
        "pictures": [row["sha256"] for row in rows],
        "degradation": degraded.identity,
        "seed": config.seed,
        "fit": config.fit,
        "pixels": config.pixels.digest(),
        "size": found.network_config.image_size,
        "calibration": calibration.digest,
        "metrics": metrics,
        "outside": judges.names,
        "dial": list(config.dial),
        "quality": config.quality,
    }
    if config.latents != "codes":
        identity["latents"] = config.latents
    if config.further:
        identity["further"] = list(config.further)
    if config.fidelity != (0.0,):
        identity["fidelity"] = list(config.fidelity)
    weights = str(found.metadata["weights_digest"])
    earlier = _earlier(output, digest(identity, 32), weights)
    if earlier is not None:
        return earlier
    hq = _pictures(corpus, rows, found.network_config.image_size, config)
    lq = [degraded.picture(number, row["key"], hq[number]) for number, row in enumerate(rows)]
    judge = Judge(calibration, metrics, config.device, hq, judges.maps, config.weights_uri)
    require_current_metrics(corpus, calibration, judge.scorers)
    restorer = Restorer.load(directory, device=config.device)
    if config.latents == "continuous":
        restorer = restored_without_codes(restorer)
    settings = sorted({*config.dial, *config.further, config.quality})
    restored: dict[float, list[Picture]] = {}
    measured: dict[float, Measured] = {}
    first, *others = config.fidelity
    faithful: dict[float, Measured] = {}
    with progress(len(settings) + len(others) + 2, "evaluate") as meter:
        bases = {}
        for name, pictures in (("lq", lq), ("hq", hq)):
            bases[name] = judge.measure(pictures)
            meter.advance(note=name)
        for setting in settings:
            restored[setting] = list(restorer.restore_batch(lq, quality=setting, fidelity=first))
            measured[setting] = judge.measure(restored[setting])
            meter.advance(note=f"dial {setting}")
        for weight in others:
            faithful[weight] = judge.measure(restorer.restore_batch(lq, quality=config.quality, fidelity=weight))
            meter.advance(note=f"fidelity {weight}")
    good = _above_threshold(rows, view)
    if others:
        faithful = {first: measured[config.quality], **faithful}
    result = _result(config, bases, measured, faithful, digest(identity, 32), found, good, output.url, judges.names)
    _write(output, result, weights, rows, lq, hq, [restored[setting] for setting in _shown(settings)])
    return result


def _by_key(row: dict[str, Any]) -> str:
    return str(row["key"])


def _require_same_calibration(lineage: Mapping[str, str], view: View) -> None:
    if lineage.get("calibration") != view.facts["calibration"]:
        raise VerificationError(
            f"The checkpoint was trained with calibration {lineage.get('calibration')}, the view "
            f"{view.reference} has {view.facts['calibration']}: quality would mean two things.",
            "Evaluate on a view of the labels it was trained with.",
        )


@dataclass(frozen=True)
class Degraded:
    """Where degraded pictures come from: pairs, or a degradation that is a function of the seed and the key."""

    identity: dict[str, Any]
    picture: Callable[[int, str, Picture], Picture]
    """(number, key, good picture) -> degraded picture of the same size."""


def _degraded(config: EvaluateConfig, found: checkpoint.Checkpoint, corpus: Corpus, keys: list[str]) -> Degraded:
    size = found.network_config.image_size
    if config.pairs.lq:
        pairs = find_pairs(config.pairs, corpus, keys, config.pixels)
        return Degraded(
            {"pairs": pairs.digest}, lambda number, key, hq: fit_picture(pairs.lq(number), size, config.fit)
        )
    degradation = _degradation(config, found)
    return Degraded(
        degradation.to_dict(),
        lambda number, key, hq: degrade(hq, parameters_for_key(degradation, config.seed, key)),
    )


def _degradation(config: EvaluateConfig, found: checkpoint.Checkpoint) -> DegradationConfig:
    name = config.degradation or found.metadata["lineage"].get("degradation", "")
    if not name:
        raise UsageError(
            f"The checkpoint {config.checkpoint} names no degradation.", "Give --degradation or --pairs.lq."
        )
    return scaled(degradation_preset(name), found.network_config.image_size)


def _pictures(corpus: Corpus, rows: list[dict[str, Any]], size: int, config: EvaluateConfig) -> list[Picture]:
    cache = ShardCache(corpus)
    return [
        fit_picture(
            decode(cache.read(row["shard"], row["byte_offset"], row["byte_size"]), config.pixels).array,
            size,
            config.fit,
        )
        for row in rows
    ]


def _result(
    config: EvaluateConfig,
    bases: Mapping[str, Measured],
    measured: Mapping[float, Measured],
    faithful: Mapping[float, Measured],
    identity: str,
    found: checkpoint.Checkpoint,
    good: list[bool],
    output: str,
    outside: list[str],
) -> EvaluateResult:
    best = measured[config.quality]
    curve = [[setting, measured[setting].quality] for setting in config.dial]
    spearman = float(spearmanr(*zip(*curve, strict=True)).statistic)
    prior = _prior(found)
    sets = {**bases, "restored": best}
    return EvaluateResult(
        digest=identity,
        quality={name: value.quality for name, value in sets.items()},
        dial=curve,
        dial_spearman=0.0 if math.isnan(spearman) else spearman,
        dial_range=curve[-1][1] - curve[0][1],
        psnr={"lq": bases["lq"].psnr, "restored": best.psnr},
        ssim={"lq": bases["lq"].ssim, "restored": best.ssim},
        metrics={
            name: {
                **{base: bases[base].scores[name] for base in bases},
                "restored": best.scores[name],
                "dial": [measured[setting].scores[name] for setting in config.dial],
                "in_loss": name in prior,
            }
            for name in best.scores
        },
        samples=len(good),
        checkpoint=config.checkpoint,
        lineage=dict(found.metadata["lineage"]),
        output=output,
        outside=outside_figures(
            outside,
            {name: value.scores for name, value in sets.items()},
            {setting: measured[setting].scores for setting in config.dial},
        ),
        outside_metrics=outside,
        curve={
            "psnr": [measured[setting].psnr for setting in config.dial],
            "ssim": [measured[setting].ssim for setting in config.dial],
        },
        further=[{"requested": setting, **measured[setting].means([True] * len(good))} for setting in config.further],
        fidelity=[{"fidelity": weight, **value.means([True] * len(good))} for weight, value in faithful.items()],
        high_quality={"samples": float(sum(good)), **best.means(good)} if any(good) else {},
    )


def _prior(found: checkpoint.Checkpoint) -> list[str]:
    """Metrics of the loss that the weights were trained with."""
    return str(found.metadata["lineage"].get("prior", "")).split()


def _above_threshold(rows: list[dict[str, Any]], view: View) -> list[bool]:
    """Which pictures have a quality above the HQ+ threshold of the view's labels."""
    return [row["quality"] > view.facts["hq_threshold"] for row in rows]


def _earlier(output: Storage, identity: str, weights: str) -> EvaluateResult | None:
    """The result that is there already, if it is of these weights and this evaluation."""
    if not output.exists(EVALUATION):
        return None
    values = json.loads(output.read(EVALUATION))
    if values.pop("weights_digest", None) != weights or values["digest"] != identity:
        return None
    return EvaluateResult(**values)


def _shown(settings: list[float]) -> list[float]:
    """The lowest, the middle and the highest setting."""
    return [settings[0], settings[len(settings) // 2], settings[-1]]


def _write(
    output: Storage,
    result: EvaluateResult,
    weights: str,
    rows: list[dict[str, Any]],
    lq: list[Picture],
    hq: list[Picture],
    columns: list[list[Picture]],
) -> None:
    """Examples first, evaluation.json last: where it is, everything is."""
    for row, picture in list(zip(rows, lq, strict=True))[:EXAMPLES]:
        output.publish(f"lq/{row['key']}.png", encode_png(picture))
    picture = montage([lq, *columns, hq], min(EXAMPLES, len(hq)))
    output.publish(MONTAGE, encode_png(picture))
    values = {**dataclasses.asdict(result), "weights_digest": weights}
    output.publish(EVALUATION, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())


def montage(columns: list[list[Picture]], count: int, smallest: int = 96) -> Picture:
    """A row per picture, a column per version, in whole-number enlargement: uint8 RGB HWC."""
    times = max(1, smallest // columns[0][0].shape[0])
    lines = [np.concatenate([column[i] for column in columns], axis=1) for i in range(count)]
    sheet = np.concatenate(lines, axis=0)
    return np.ascontiguousarray(sheet.repeat(times, axis=0).repeat(times, axis=1))
