"""The quality prior of a view: its calibrated differentiable metrics, as one frozen module."""

from dataclasses import dataclass
from typing import Literal

import torch

from iqpir.errors import UsageError
from iqpir.quality_prior import PiecewiseLinear, QualityPrior
from pipeline.corpus import Corpus
from pipeline.judging.outside import held_out
from pipeline.metrics import find_metrics
from pipeline.scoring.calibration import Calibration, read_calibration
from pipeline.view import View, read_view


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Which metrics, and how much of a picture they see: see ``QualityPrior``."""

    metrics: list[str]
    """Differentiable ones of the labels."""
    max_side: int | None = None
    """Largest side that they see; None: all of it."""
    bound: Literal["crop", "resize"] = "crop"
    """How larger pictures are brought to it."""
    weights_uri: str = ""
    """Mirror of the metrics' weight files; "": they are in the caches of libraries."""


def check_prior(corpus: Corpus, view: View, config: PriorConfig) -> None:
    """Prove in the driver that the prior can be built.

    Raises:
        UsageError: an unknown metric, one without gradient, one the labels were not made with, or no metric left
            that could judge from outside the loss.
    """
    calibration = read_calibration(corpus, view.facts["calibration_name"])
    held_out(calibration, list(calibration.metrics), config.metrics, [])
    build_prior(corpus, view.reference, config, torch.device("cpu"))


def build_prior(corpus: Corpus, reference: str, config: PriorConfig, device: torch.device) -> QualityPrior:
    """Mean of the calibrated metrics of ``config``, with the maps that made the view's labels.

    Raises:
        UsageError: as for ``check_prior``.
    """
    view = read_view(corpus, reference)
    return prior_by(read_calibration(corpus, view.facts["calibration_name"]), view.reference, config, device)


def prior_by(calibration: Calibration, reference: str, config: PriorConfig, device: torch.device) -> QualityPrior:
    """As ``build_prior``, by the calibration of the labels of the view ``reference``."""
    maps = {}
    for name in config.metrics:
        if name not in calibration.metrics:
            raise UsageError(
                f"The labels of view {reference} have no metric {name!r}.",
                f"Choose among {', '.join(calibration.metrics)}, or score and label with {name} first.",
            )
        found = calibration.metrics[name]
        # The paper's minmax reaches 0 and 1; clamped there, it would not lead back what is worse than the corpus.
        maps[name] = PiecewiseLinear(found.knots, found.values, open_ends=True)
    scorers = {
        metric.name: metric.scorer(device, config.weights_uri or None) for metric in find_metrics(config.metrics)
    }
    return QualityPrior(scorers, maps, max_side=config.max_side, bound=config.bound).to(device)
