"""Fit the metrics that this project brings itself: NIQE's model of pristine pictures, the rank networks."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from iqpir.errors import UsageError
from pipeline.metrics.distortions import Picture
from pipeline.metrics.niqe_model import fit_pristine_model, save_pristine_model
from pipeline.metrics.rank_training import log_progress, save_rank_network, train_rank_network

logger = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_WIDTHS = {"rank": (32, 64, 96), "rank_judge": (24, 56, 80)}


@dataclass(frozen=True, kw_only=True)
class FitMetricConfig:
    """What to fit, on which pictures, and where the model goes."""

    metric: Literal["rank", "rank_judge", "niqe"] = "rank"
    """``rank``: the differentiable prior; ``rank_judge``: an independent one; ``niqe``: pristine model."""
    input: str
    """Folder of natural pictures, searched with its subfolders."""
    output: str
    """File to write: .safetensors for the rank networks, .mat for niqe."""
    dataset: str
    """Name of the data set, recorded in the file."""
    licence: str
    """Licence of the data set, recorded in the file."""
    parts: int = 1
    """Split the pictures by a hash of their names into this many parts."""
    part: int = 0
    """Which part to use, from 0; two networks on two parts have seen no picture in common."""
    steps: int = 2000
    """Optimisation steps of a rank network; ignored by niqe, which has a closed form."""
    seed: int = 0
    """Seed of weights, crops and distortions."""
    threads: int = 1
    """CPU threads; another number may change the last digits of the weights."""

    def __post_init__(self) -> None:
        suffix = ".mat" if self.metric == "niqe" else ".safetensors"
        if not self.output.endswith(suffix):
            raise UsageError(f"output {self.output!r} must end in {suffix} for {self.metric}.")
        if not 0 <= self.part < self.parts:
            raise UsageError(f"part {self.part} is not below parts {self.parts}.", "Count parts from 0.")
        if self.steps < 1 or self.threads < 1:
            raise UsageError(f"steps {self.steps} and threads {self.threads} must be positive.")


@dataclass(frozen=True)
class FitMetricResult:
    """What was fitted."""

    metric: str
    output: str
    sha256: str
    pictures: int


def fit_metric(config: FitMetricConfig) -> FitMetricResult:
    """Fit a metric's model on a folder of natural pictures; seeded, so it can be reproduced.

    Raises:
        UsageError: no usable picture in the folder.
    """
    paths = _select(Path(config.input), config.parts, config.part)
    pictures = [_read(path) for path in paths]
    facts = {
        "metric": config.metric,
        "dataset": config.dataset,
        "licence": config.licence,
        "pictures": str(len(pictures)),
        "pictures_sha256": _digest(pictures),
        "seed": str(config.seed),
    }
    output = Path(config.output)
    logger.info("fitting %s on %d pictures", config.metric, len(pictures))
    if config.metric == "niqe":
        save_pristine_model(fit_pristine_model(pictures), output, facts)
    else:
        torch.set_num_threads(config.threads)
        network = train_rank_network(
            pictures,
            widths=_WIDTHS[config.metric],
            steps=config.steps,
            seed=config.seed,
            progress=log_progress(config.steps),
        )
        save_rank_network(network, output, {**facts, "steps": str(config.steps)})
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    return FitMetricResult(metric=config.metric, output=str(output), sha256=digest, pictures=len(pictures))


def _select(folder: Path, parts: int, part: int) -> list[Path]:
    """Picture files of this part, sorted by their path relative to ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    chosen = [
        path
        for path in files
        if int(hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest(), 16) % parts == part
    ]
    if not chosen:
        raise UsageError(f"No pictures ({', '.join(_SUFFIXES)}) for part {part} of {parts} in {folder}.")
    return chosen


def _read(path: Path) -> Picture:
    """uint8 RGB; pictures below 192 pixels are refused: no room for a crop and its margin at 128."""
    with Image.open(path) as image:
        picture = np.asarray(image.convert("RGB"))
    if min(picture.shape[:2]) < 192:
        raise UsageError(f"{path} is smaller than 192 pixels.", "Remove it from the folder.")
    return picture


def _digest(pictures: list[Picture]) -> str:
    total = hashlib.sha256()
    for picture in pictures:
        total.update(hashlib.sha256(picture.tobytes()).digest())
    return total.hexdigest()
