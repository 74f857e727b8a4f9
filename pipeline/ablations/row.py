"""What one run of an ablation leaves: a JSON row with figures, where they come from, and what they cost."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from pipeline.evaluate import EvaluateResult
from pipeline.layout import to_json
from pipeline.storage import Storage

OUTSIDE = "outside"
"""Name of the mean over metrics that no variant has in its loss."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: a variant trained from one seed."""

    figures: dict[str, float]
    """At the highest dial setting, of the curve, and at its best setting (``best_``)."""
    bases: dict[str, dict[str, float]]
    """``lq`` and ``hq``: quality, each metric and their outside mean; PSNR and SSIM of ``lq``."""
    dial: list[float]
    """Requested qualities."""
    curves: dict[str, list[float]]
    """Quality, each metric, their outside mean, PSNR and SSIM at each of ``dial``."""
    variant: str = ""
    """Name of the variant."""
    seed: int = 0
    """Of the training."""
    identity: str = ""
    """Digest of code, data, settings and seed."""
    commit: str = ""
    """Of this repository; ``+changes`` where the files were others."""
    machine: dict[str, str] = field(default_factory=dict)
    """What it ran on."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What differs from the recipe."""
    training: dict[str, float] = field(default_factory=dict)
    """Mean quality and mean score of each metric of the training pictures."""
    step_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each step; little for one that was done earlier."""
    seconds: float = 0.0
    """Of the run."""


def row_of(found: EvaluateResult, outside: Sequence[str]) -> Row:
    """The figures of an evaluation.

    Args:
        found: with ``outside`` among its metrics.
        outside: metrics whose mean is the quality outside every loss.
    """
    metrics = found.metrics
    settings = [setting for setting, _ in found.dial]
    curves = {"quality": [measured for _, measured in found.dial], **found.curve}
    curves |= {name: list(values["dial"]) for name, values in metrics.items()}
    curves[OUTSIDE] = _mean([curves[name] for name in outside])
    figures = {
        "quality": found.quality["restored"],
        OUTSIDE: float(np.mean([metrics[name]["restored"] for name in outside])),
        "psnr": found.psnr["restored"],
        "ssim": found.ssim["restored"],
        **{name: values["restored"] for name, values in metrics.items()},
        **{f"hq_{name}": value for name, value in found.high_quality.items()},
    }
    for name in ("quality", OUTSIDE):
        figures[f"best_{name}"] = max(curves[name])
        figures[f"{name}_spearman"] = _spearman(settings, curves[name])
        figures[f"{name}_range"] = curves[name][-1] - curves[name][0]
    return Row(figures=figures, bases=_bases(found, outside), dial=settings, curves=curves)


def _bases(found: EvaluateResult, outside: Sequence[str]) -> dict[str, dict[str, float]]:
    bases: dict[str, dict[str, float]] = {}
    for base in ("lq", "hq"):
        scores = {name: float(values[base]) for name, values in found.metrics.items()}
        mean = float(np.mean([scores[name] for name in outside]))
        bases[base] = {"quality": found.quality[base], OUTSIDE: mean, **scores}
    bases["lq"] |= {"psnr": found.psnr["lq"], "ssim": found.ssim["lq"]}
    return bases


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [float(value) for value in np.mean(curves, axis=0)]


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """0 where ``second`` is constant: a dial that does nothing."""
    return 0.0 if len(set(second)) < 2 else float(spearmanr(first, second).statistic)


def write_row(folder: Storage, row: Row) -> None:
    """Keep a row; one of the same variant and seed is replaced."""
    folder.publish(_path(row.variant, row.seed), to_json(asdict(row)))


def read_row(folder: Storage, variant: str, seed: int) -> Row | None:
    """The row of a run, or None."""
    path = _path(variant, seed)
    return Row(**json.loads(folder.read(path))) if folder.exists(path) else None


def _path(variant: str, seed: int) -> str:
    return f"rows/{variant}-{seed}.json"
