"""A condition of several scores: calibrated scores of metrics, one for each quality map, in place of the quality."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from iqpir.config import NetworkConfig
from iqpir.errors import UsageError
from pipeline.view import View

SCORES = "scores"
"""In a lineage: metrics whose scores are the condition, in the order of the network's maps; absent for the quality."""
BINS = 10


def bins_of(scores: Sequence[str]) -> dict[str, Any]:
    """What several scores change in the network's configuration; the user's own bins come after it."""
    return {"quality_bins": [BINS] * len(scores)} if scores else {}


def check_scores(scores: Sequence[str], network: NetworkConfig, view: View) -> None:
    """Prove that the view has the scores, and the network a use for them.

    Raises:
        UsageError: another number than the network has maps for, a metric that the labels or a sample lack, or a
            network to which only the one quality has a meaning.
    """
    bins = len(network.quality_bins)
    if bins != max(1, len(scores)):
        raise UsageError(
            f"network.quality_bins has {bins} entries for {max(1, len(scores))} score(s).",
            "Name as many metrics in --scores; their calibrated scores are the condition.",
        )
    if not scores:
        return
    unknown = [name for name in scores if name not in view.facts["metrics"]]
    if unknown or len(set(scores)) < len(scores):
        raise UsageError(
            f"scores {', '.join(scores)}: each must be another metric of the labels of view {view.reference}.",
            f"Choose among {', '.join(view.facts['metrics'])}.",
        )
    if network.conditioning == "none" or network.hq_gate == "paper":
        raise UsageError(
            f"scores need a condition and an open gate; network.conditioning is {network.conditioning}, hq_gate "
            f"{network.hq_gate}.",
            "S_thr is a threshold of the one quality: use hq_gate code.",
        )
    missing = int(np.isnan(condition(view.split("train"), scores)).any(axis=1).sum())
    if missing:
        raise UsageError(
            f"{missing} samples of view {view.reference} lack one of the scores {', '.join(scores)}.",
            "Curate with --where 'quality is not null'.",
        )


def condition(rows: pa.Table, scores: Sequence[str]) -> NDArray[np.float32]:
    """What each row of a view is conditioned on: float32 [N], its quality, or [N, n], its calibrated ``scores``."""
    if not scores:
        return np.asarray(rows["quality"].to_numpy(), np.float32)
    columns = [rows[f"iqa_{name}_cal"].to_numpy() for name in scores]
    return np.stack(columns, axis=1).astype(np.float32)


def scores_of_metrics(prior: Sequence[str], scores: Sequence[str]) -> list[int] | None:
    """Which of the ``scores`` each metric of the prior is to match; None where one is among none: their means match."""
    return [scores.index(name) for name in prior] if scores and set(prior) <= set(scores) else None
