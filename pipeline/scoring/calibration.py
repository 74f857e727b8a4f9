"""Calibrations: frozen monotone maps from raw scores to quality in [0, 1), fitted once, used everywhere.

``ecdf`` maps a score to its rank in the reference set, so scales and directions of metrics do not matter.
``minmax`` is the paper's ``(s - min) / (max - min + 1e-6)``; ``range`` uses the metric's nominal interval.
The mean of calibrated scores is the paper's consensus S. The mean of several even distributions is not even:
a last ECDF (``consensus``) makes it so, and equally wide quality bins then hold equally many pictures.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from iqpir.config import digest
from iqpir.errors import UsageError, VerificationError
from iqpir.quality_prior import PiecewiseLinear
from pipeline.corpus import Corpus
from pipeline.documents import stamped, write_document
from pipeline.layout import calibration_path

Kind = Literal["ecdf", "range", "minmax"]
Values = NDArray[np.float64]

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
"""Largest float32 below 1: bins are ``floor(bins * quality)``, and bin ``bins`` does not exist."""


@dataclass(frozen=True, kw_only=True)
class ScoreMap:
    """A monotone piecewise linear map; beyond its knots see ``iqpir.quality_prior.PiecewiseLinear``."""

    kind: Kind
    direction: Literal["higher", "lower"]
    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, scores: ArrayLike) -> Values:
        """Raw scores -> values in [0, 1), float64; NaN stays NaN."""
        module = PiecewiseLinear(self.knots, self.values)
        mapped = module(torch.as_tensor(np.asarray(scores, np.float64))).numpy()
        return np.asarray(np.minimum(mapped, BELOW_ONE), np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": self.kind,
            "direction": self.direction,
            "knots": list(self.knots),
            "values": list(self.values),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ScoreMap":
        """Inverse of ``to_dict``."""
        return cls(
            kind=values["kind"],
            direction=values["direction"],
            knots=tuple(values["knots"]),
            values=tuple(values["values"]),
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One map per metric, and one for their mean.

    Attributes:
        name: under which it is stored.
        metrics: metric -> map of its raw scores.
        fingerprints: metric -> fingerprint of the scores it was fitted on; others are another scale.
        consensus: map of the mean that evens out its distribution; None: the mean itself is the quality.
        reference: facts of the reference set: manifest digest, number of samples.
    """

    name: str
    metrics: dict[str, ScoreMap]
    fingerprints: dict[str, str]
    consensus: ScoreMap | None
    reference: dict[str, Any]

    @property
    def digest(self) -> str:
        """12 hex digits over maps and fingerprints: what decides a quality; not the name."""
        values = self.to_dict()
        return digest({key: values[key] for key in ("metrics", "fingerprints", "consensus")})

    def calibrate(self, raw: Mapping[str, ArrayLike]) -> dict[str, Values]:
        """Calibrated score per metric, in [0, 1), 1 best; NaN where the raw score is.

        Raises:
            UsageError: a metric that has no map here.
        """
        unknown = sorted(set(raw) - set(self.metrics))
        if unknown:
            raise UsageError(
                f"Calibration {self.name} has no metric {', '.join(unknown)}.",
                f"It has {', '.join(self.metrics)}; label with the others to get one that has them.",
            )
        return {name: self.metrics[name](scores) for name, scores in raw.items()}

    def quality(self, raw: Mapping[str, ArrayLike]) -> Values:
        """Quality in [0, 1): the evened mean over the calibrated metrics; NaN where one is missing.

        The consensus map belongs to the mean of all metrics. For a part of them the plain mean is returned.
        """
        mean: Values = np.mean(list(self.calibrate(raw).values()), axis=0)
        if self.consensus is None or set(raw) != set(self.metrics):
            return mean
        return self.consensus(mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "metrics": {name: found.to_dict() for name, found in self.metrics.items()},
            "fingerprints": self.fingerprints,
            "consensus": None if self.consensus is None else self.consensus.to_dict(),
            "reference": self.reference,
        }


def fit_calibration(
    name: str,
    raw: Mapping[str, Values],
    metrics: Mapping[str, Mapping[str, Any]],
    *,
    kind: Kind,
    knots: int = 65,
    even: bool = True,
    reference: Mapping[str, Any],
) -> Calibration:
    """Fit maps on raw scores.

    Args:
        name: of the calibration.
        raw: metric -> scores [N] of the reference set; NaN where the metric failed.
        metrics: metric -> its facts: ``direction``, ``score_range``, ``fingerprint``.
        kind: of the maps.
        knots: at most so many points of an ECDF.
        even: fit the consensus map, too.
        reference: facts to store.

    Raises:
        UsageError: a metric without a score, or without nominal range where ``kind`` is ``range``.
    """
    maps = {}
    for metric, scores in raw.items():
        finite = scores[np.isfinite(scores)]
        if not len(finite):
            raise UsageError(f"Metric {metric} has no score to fit a calibration on.", "Run jobs/score.py.")
        facts = metrics[metric]
        maps[metric] = fit_map(finite, kind, facts["direction"], knots, facts.get("score_range"), metric)
    consensus = None
    if even:
        mean = np.mean([maps[metric](scores) for metric, scores in raw.items()], axis=0)
        mean = mean[np.isfinite(mean)]
        if not len(mean):
            raise UsageError("No sample has a score of every metric.", "See the statuses of the scores.")
        consensus = fit_map(mean, "ecdf", "higher", knots)
    return Calibration(
        name=name,
        metrics=maps,
        fingerprints={metric: str(metrics[metric]["fingerprint"]) for metric in raw},
        consensus=consensus,
        reference=dict(reference),
    )


def fit_map(
    scores: Values,
    kind: Kind,
    direction: Literal["higher", "lower"],
    knots: int = 65,
    score_range: Sequence[float] | None = None,
    metric: str = "this metric",
) -> ScoreMap:
    """One map. ``scores`` [N] are finite, N >= 1; a lower-is-better metric gets a falling map.

    Raises:
        UsageError: ``kind`` is ``range`` and there is no ``score_range``.
    """
    if kind == "ecdf":
        x, y = _ecdf(scores, knots)
    elif kind == "minmax":
        x, y = np.array([scores.min(), scores.max() + 1e-6]), np.array([0.0, 1.0])
    elif score_range is None:
        raise UsageError(f"{metric} declares no range.", "Use the calibration ecdf or minmax.")
    else:
        x, y = np.asarray(score_range, np.float64), np.array([0.0, 1.0])
    values = 1.0 - y if direction == "lower" else y
    return ScoreMap(
        kind=kind,
        direction=direction,
        knots=tuple(float(value) for value in x),
        values=tuple(float(value) for value in values),
    )


def _ecdf(scores: Values, knots: int) -> tuple[Values, Values]:
    """Knots x, strictly increasing, and rising values strictly inside (0, 1).

    The values are the middles of ``n`` equal shares; equal knots (ties) become one with the mean value.
    """
    count = max(2, min(knots, len(scores)))
    shares = (np.arange(count) + 0.5) / count
    x, owner = np.unique(np.quantile(scores, shares), return_inverse=True)
    y = np.bincount(owner, weights=shares) / np.bincount(owner)
    # Quantiles may differ by rounding alone; such knots would make a step of nearly infinite slope.
    keep = np.concatenate([[True], np.diff(x) > 1e-9 * max(1.0, float(np.abs(x).max()))])
    x, y = x[keep], y[keep]
    if len(x) == 1:
        return np.array([x[0] - 1.0, x[0] + 1.0]), np.array([0.25, 0.75])
    return x, y


def write_calibration(corpus: Corpus, calibration: Calibration) -> None:
    """Store a calibration under its name; storing the same one again changes nothing.

    Raises:
        UsageError: the name is taken by another one: calibrations are frozen.
    """
    values = stamped({**calibration.to_dict(), "digest": calibration.digest})
    stored = write_document(corpus.storage, calibration_path(calibration.name), values)
    if stored.get("digest") != calibration.digest:
        raise UsageError(
            f"The corpus has another calibration called {calibration.name} ({stored.get('digest')}).",
            "Calibrations are frozen: choose another name, or reuse that one.",
        )


def read_calibration(corpus: Corpus, name: str) -> Calibration:
    """The calibration called ``name``.

    Raises:
        UsageError: there is none; the message lists those there are.
        VerificationError: it is not what its digest says.
    """
    path = calibration_path(name)
    try:
        values = json.loads(corpus.storage.read(path))
    except FileNotFoundError as error:
        entries = corpus.storage.list("calibrations")
        known = [entry.path.split("/")[-1].removesuffix(".json") for entry in entries]
        raise UsageError(
            f"The corpus {corpus.storage.url} has no calibration {name!r}.",
            f"Known: {', '.join(known) or 'none'}; jobs/label.py makes one.",
        ) from error
    consensus = values["consensus"]
    calibration = Calibration(
        name=values["name"],
        metrics={metric: ScoreMap.from_dict(found) for metric, found in values["metrics"].items()},
        fingerprints=values["fingerprints"],
        consensus=None if consensus is None else ScoreMap.from_dict(consensus),
        reference=values["reference"],
    )
    if calibration.digest != values["digest"]:
        raise VerificationError(f"{corpus.storage.uri(path)} is not what its digest {values['digest']} says.")
    return calibration
