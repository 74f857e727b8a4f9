"""Metrics held out of a loss: what has been optimised is no judge of how well."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from iqpir.errors import UsageError
from pipeline.metrics import find_metrics
from pipeline.scoring.calibration import Calibration, ScoreMap, fit_map

JUDGE = "rank_judge"
"""Embedded network that judges where every metric of the labels was in the loss."""


@dataclass(frozen=True)
class HeldOut:
    """Which metrics judge from outside the loss, and maps of those that are not measured anyhow."""

    names: list[str]
    maps: Mapping[str, ScoreMap]
    """Of the calibration, or by the nominal interval of the metric."""


def held_out(calibration: Calibration, measured: Sequence[str], prior: Iterable[str], wanted: Sequence[str]) -> HeldOut:
    """The metrics that judge a model from outside its loss.

    Args:
        calibration: of the labels.
        measured: metrics that are measured anyhow.
        prior: metrics of the loss.
        wanted: the judges; by default those of ``measured`` that are not in ``prior``, else ``rank_judge``.

    Raises:
        UsageError: a judge was in the loss, or has neither a map in the calibration nor a nominal interval; or all
            that could judge were in the loss.
    """
    prior = set(prior)
    names = list(wanted) or [name for name in measured if name not in prior] or [JUDGE]
    inside = [name for name in names if name in prior]
    if inside:
        raise UsageError(
            f"{', '.join(inside)} was in the loss: it is no judge of what the loss has made.",
            "Keep a metric of the labels out of --prior, or evaluate with another one: --outside of jobs/evaluate.py.",
        )
    unmeasured = [name for name in names if name not in measured]
    return HeldOut(names, {name: calibration.metrics.get(name) or _nominal(name) for name in unmeasured})


def _nominal(name: str) -> ScoreMap:
    (metric,) = find_metrics([name])
    return fit_map(np.array([0.0]), "range", metric.direction, score_range=metric.score_range, metric=name)


def outside_figures(
    names: Sequence[str], scores: Mapping[str, Mapping[str, float]], dial: Mapping[float, Mapping[str, float]]
) -> dict[str, float]:
    """Mean over the judges, and how it follows the dial.

    Args:
        names: the judges.
        scores: ``lq``, ``hq`` and ``restored`` -> mean calibrated score of each metric.
        dial: requested quality, rising -> the same.

    Returns:
        ``lq``, ``hq``, ``restored``, ``dial_spearman`` (0 where nothing moves) and ``dial_range``.
    """

    def mean(values: Mapping[str, float]) -> float:
        return float(np.mean([values[name] for name in names]))

    curve = [mean(values) for values in dial.values()]
    moves = len(set(curve)) > 1
    return {
        **{name: mean(values) for name, values in scores.items()},
        "dial_spearman": float(spearmanr(list(dial), curve).statistic) if moves else 0.0,
        "dial_range": curve[-1] - curve[0],
    }
