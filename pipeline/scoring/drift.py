"""The drift gate: score a fixed canary set again and compare with what is stored, before old and new mix.

A score depends on weights, libraries and devices. The canary set is chosen by the hash in the samples' keys, so it
is the same on every machine and stays the same while the corpus grows, but for the new samples that fall into it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import spearmanr

from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import PixelPolicy
from pipeline.corpus import Corpus
from pipeline.metrics import Scorer, find_metrics, scorer_digest
from pipeline.scoring.calibration import Calibration, Values, read_calibration
from pipeline.scoring.passes import Scoring, score_samples
from pipeline.scoring.score_unit import load_metric
from pipeline.scoring.tables import read_metric_facts, read_scores
from pipeline.scoring.tiling import TilingPolicy

log = logging.getLogger(__name__)

NOT_OF_WEIGHTS = ("fingerprint", "pixels", "pixel_policy", "format", "tiling", "cascade")
"""Facts of an edition of scores that are not the metric's own."""


@dataclass(frozen=True, kw_only=True)
class DriftPolicy:
    """How many canaries, and how far a metric may drift."""

    canaries: int = 64
    """Samples that are scored again, the first by the hash in their key."""
    min_rank_correlation: float = 0.98
    """Least Spearman correlation of stored and new scores."""
    max_change: float = 0.05
    """Largest change of a calibrated score, 0 to 1."""
    batch_pixels: int = 1 << 20
    """Most pixels in a batch."""

    def __post_init__(self) -> None:
        if self.canaries < 3:
            raise UsageError(f"canaries {self.canaries} are too few for a rank correlation.", "Take 64 or more.")
        if not (-1 <= self.min_rank_correlation <= 1 and self.max_change >= 0):
            raise UsageError(
                f"min_rank_correlation {self.min_rank_correlation} or max_change {self.max_change} is out of range."
            )


@dataclass(frozen=True)
class Drift:
    """How one metric's scores of the canaries have moved."""

    rank_correlation: float
    max_change: float
    """Of the calibrated score."""
    max_raw_change: float
    changed: int
    """Canaries with another raw score."""
    lost: int
    """Canaries that had a score and have none now, or the other way round."""
    same_weights: bool
    """Whether version and weights are those of the stored scores."""


@dataclass(frozen=True)
class DriftResult:
    """What was checked. There is no result for a metric beyond a limit: that is an error."""

    corpus: str
    calibration: str
    canaries: int
    metrics: dict[str, Drift]


def check_drift(
    corpus: Corpus,
    calibration_name: str,
    policy: DriftPolicy,
    *,
    device: str = "cpu",
    weights_uri: str = "",
) -> DriftResult:
    """Score the canaries with the metrics as they are now and compare with the scores of a calibration.

    Raises:
        UsageError: no such calibration, or its metrics cannot be built.
        VerificationError: a metric has drifted; says which, and how much.
        PermanentError: a metric is broken.
    """
    calibration = read_calibration(corpus, calibration_name)
    facts = {name: read_metric_facts(corpus, name, calibration.fingerprints) for name in calibration.metrics}
    rows, stored = _canaries(corpus, facts, policy.canaries)
    found = {}
    for name, known in facts.items():
        loaded = load_metric(name, device, weights_uri)
        how = Scoring(pixels=_pixels(known, name), batch_pixels=policy.batch_pixels, tiling=_tiling(known))
        seen = [row for row, raw in zip(rows, stored[name], strict=True) if "cascade" not in known or np.isfinite(raw)]
        scored = score_samples(corpus, seen, [loaded], how).of(name)
        raw = [scored[row["key"]].raw if row["key"] in scored else None for row in rows]
        now = np.array([np.nan if value is None else np.float32(value) for value in raw], np.float64)
        same = _own(known) == _own({**loaded.metric.facts(), "weights_sha256": loaded.weights_sha256})
        found[name] = _compare(calibration, name, stored[name], now, same)
        log.info("%s: %s", name, found[name])
    result = DriftResult(corpus.storage.url, calibration.name, len(rows), found)
    _require_still(result, policy)
    return result


def require_current_metrics(corpus: Corpus, calibration: Calibration, scorers: Mapping[str, Scorer]) -> None:
    """Prove that ``scorers`` are the metrics whose scores ``calibration`` was fitted on, by version and weights.

    Args:
        corpus: has the calibration's scores.
        calibration: whose maps will be used on new scores.
        scorers: metric -> scorer that gives those scores, before its first use.

    Raises:
        UsageError: the corpus lacks the facts of those scores.
        VerificationError: a metric has other weights, another version, or was scored in tiles.
    """
    for metric in find_metrics(list(scorers)):
        known = read_metric_facts(corpus, metric.name, calibration.fingerprints)
        now = {**metric.facts(), "weights_sha256": scorer_digest(scorers[metric.name])}
        stored = _own(known)
        different = sorted(name for name in stored.keys() | now.keys() if stored.get(name) != now.get(name))
        if different:
            raise VerificationError(
                f"Calibration {calibration.name} was fitted on other scores of {metric.name}: "
                f"{', '.join(different)} differ from those of this machine.",
                "Use the weights and versions it was made with (weights_uri), or score and label again; "
                "jobs/label.py --check says how much the scores differ.",
            )
        if "tiling" in known:
            raise VerificationError(
                f"Calibration {calibration.name} was fitted on {metric.name} in tiles {known['tiling']}, and whole "
                "pictures have other scores.",
                "Label with scores of whole pictures.",
            )


def _own(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in NOT_OF_WEIGHTS}


def _canaries(
    corpus: Corpus, facts: Mapping[str, Mapping[str, Any]], count: int
) -> tuple[list[dict[str, Any]], dict[str, Values]]:
    """Rows of the samples with the smallest keys (hashes, hence a fair draw), and their stored raw scores."""
    units = read_scores(corpus, facts)
    keys = np.concatenate([np.array(unit.keys.to_pylist(), object) for unit in units]) if units else np.array([])
    chosen = np.argsort(keys)[:count]
    stored = {name: np.concatenate([unit.raw[name] for unit in units])[chosen] for name in facts}
    columns = ["key", "shard", "byte_offset", "byte_size", "sha256"]
    samples = corpus.samples(columns)
    position = pc.index_in(pa.array(keys[chosen].tolist(), pa.string()), samples["key"].combine_chunks())
    rows: list[dict[str, Any]] = samples.take(position).to_pylist()
    if len(rows) < 3:
        raise UsageError(f"{len(rows)} samples are too few for a rank correlation.", "The corpus is too small.")
    return rows, stored


def _pixels(facts: Mapping[str, Any], name: str) -> PixelPolicy:
    """The policy that the stored scores were made with."""
    known = {field.name for field in fields(PixelPolicy)}
    stored: Mapping[str, Any] = facts.get("pixel_policy", {})
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items() if key in known
    }
    policy = PixelPolicy(**values)
    if policy.digest() != facts["pixels"]:
        raise UsageError(
            f"The scores of {name} were made with the pixel policy {facts['pixels']}, which is not known here.",
            "Score again: pictures are decoded differently now.",
        )
    return policy


def _tiling(facts: Mapping[str, Any]) -> TilingPolicy:
    return TilingPolicy(**facts.get("tiling", {}))


def _compare(calibration: Calibration, name: str, stored: Values, now: Values, same_weights: bool) -> Drift:
    """Stored against new raw scores [N]; NaN where there is none."""
    both = np.isfinite(stored) & np.isfinite(now)
    before, after = stored[both], now[both]
    moved: NDArray[np.float64] = np.abs(calibration.metrics[name](after) - calibration.metrics[name](before))
    return Drift(
        rank_correlation=_spearman(before, after),
        max_change=float(moved.max(initial=0.0)),
        max_raw_change=float(np.abs(after - before).max(initial=0.0)),
        changed=int((before != after).sum()),
        lost=int((np.isfinite(stored) != np.isfinite(now)).sum()),
        same_weights=same_weights,
    )


def _spearman(before: Values, after: Values) -> float:
    """1 where nothing changed, also for a metric that says the same of all."""
    if np.array_equal(before, after):
        return 1.0
    if len(before) < 3 or np.ptp(before) == 0 or np.ptp(after) == 0:
        return 0.0
    return float(spearmanr(before, after).statistic)


def _require_still(result: DriftResult, policy: DriftPolicy) -> None:
    found = []
    for name, drift in result.metrics.items():
        reasons = []
        if not drift.rank_correlation >= policy.min_rank_correlation:
            reasons.append(f"rank correlation {drift.rank_correlation:.4f} is below {policy.min_rank_correlation:g}")
        if not drift.max_change <= policy.max_change:
            reasons.append(f"a calibrated score changed by {drift.max_change:.4f}, more than {policy.max_change:g}")
        if drift.lost:
            reasons.append(f"{drift.lost} canaries have a score before or after only")
        if reasons:
            weights = "" if drift.same_weights else " (other weights or version)"
            found.append(f"{name}{weights}: {'; '.join(reasons)}")
    if found:
        raise VerificationError(
            f"Of {result.canaries} canaries of {result.corpus}: {' | '.join(found)}.",
            "Score and label under another name with the metrics as they are now, or bring the former ones back.",
        )
