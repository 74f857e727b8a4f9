"""Turn scores into labels: calibrated scores, their consensus (the quality), its bin, and the HQ+ flag."""

import itertools
import json
import logging
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from iqpir.config import digest
from iqpir.errors import UsageError
from pipeline.corpus import Corpus
from pipeline.documents import in_threads, publish_table, write_document
from pipeline.layout import ObjectRef, label_schema, labels_index_path, labels_path
from pipeline.scoring.calibration import (
    BELOW_ONE,
    Calibration,
    Kind,
    fit_calibration,
    read_calibration,
    write_calibration,
)
from pipeline.scoring.cascade import SKIPPED
from pipeline.scoring.drift import DriftPolicy, DriftResult, check_drift
from pipeline.scoring.tables import UnitScores, read_metric_facts, read_scores, read_table

log = logging.getLogger(__name__)

_QUANTILE = re.compile(r"^q(0?\.\d+|0|1)$")
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Which scores become labels, and how."""

    corpus: str
    """Folder or URL of a scored corpus."""
    name: str = "default"
    """Of the labels, and of the calibration that is fitted for them."""
    metrics: list[str] = field(default_factory=lambda: ["piqe", "niqe", "rank"])
    """Metrics of the consensus; each must have scored the whole corpus."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Metric -> fingerprint, for metrics whose scores the corpus has in several editions."""
    calibration: Kind = "ecdf"
    """Kind of map: ecdf (rank in this corpus), minmax (the paper's), range (nominal interval)."""
    reuse: str = ""
    """Name of a calibration of this corpus to use instead of fitting one: qualities stay comparable."""
    consensus: bool = True
    """Even out the distribution of the mean, so that bins hold equally many samples."""
    knots: int = 65
    """Points of an ecdf."""
    hq_threshold: float | str = "q0.7"
    """S_thr: a quality such as 0.7, or a quantile such as q0.7 (3 of 10 samples are above it)."""
    bins: int = 10
    """Bins of the quality: floor(bins * quality)."""
    check: bool = False
    """Label nothing: score a canary set again with the metrics of the calibration called reuse (or name) and end
    with exit code 4 if one has drifted."""
    drift: DriftPolicy = field(default_factory=DriftPolicy)
    """With check: the canaries and the limits."""
    device: str = "cpu"
    """With check: where metrics run, cpu or cuda."""
    weights_uri: str = ""
    """With check: folder or URL with weight files, as in jobs/score.py."""

    def __post_init__(self) -> None:
        if not NAME.match(self.name):
            raise UsageError(f"name {self.name!r} may hold letters, digits, '_', '.' and '-' only.")
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise UsageError(f"metrics {self.metrics} is empty or names one twice.")
        if self.bins < 2 or self.knots < 2:
            raise UsageError(f"bins {self.bins} and knots {self.knots} must be 2 or more.")
        if not _QUANTILE.match(str(self.hq_threshold)):
            try:
                valid = 0.0 <= float(self.hq_threshold) <= 1.0
            except ValueError:
                valid = False
            if not valid:
                raise UsageError(
                    f"hq_threshold {self.hq_threshold!r} is no quality.", "Write 0.7, or q0.7 for a quantile."
                )


@dataclass(frozen=True)
class LabelResult:
    """What was labelled."""

    corpus: str
    name: str
    version: int
    """Of the labels: 2 and more are those of a corpus that has grown."""
    calibration: str
    """Name of the calibration."""
    calibration_digest: str
    hq_threshold: float
    labelled: int
    unlabelled: int
    """Samples without a quality, because a metric failed on them or a cascade kept one from them."""
    skipped: int
    """Those of them that a cascade kept from a metric."""
    hq_plus: int
    histogram: list[int]
    """Samples in each bin."""


def label_or_check(config: LabelConfig) -> LabelResult | DriftResult:
    """Label, or with ``check`` prove that the metrics still score as they did.

    Raises:
        UsageError, IncompleteError: as for ``label``.
        VerificationError: a table is damaged, or a metric has drifted.
    """
    if not config.check:
        return label(config)
    return check_drift(
        Corpus(config.corpus),
        config.reuse or config.name,
        config.drift,
        device=config.device,
        weights_uri=config.weights_uri,
    )


def label(config: LabelConfig) -> LabelResult:
    """Label every scored sample. The same scores and configuration give the same labels.

    A corpus that has grown since gets the next version of its labels, by the calibration, threshold and bins that the
    first one froze; no table of a former version is touched.

    Raises:
        UsageError: unknown scores, or the name is taken by labels of other metrics or settings.
        IncompleteError: a metric has not scored every unit.
        VerificationError: a table of scores is damaged.
    """
    corpus = Corpus(config.corpus)
    facts = {metric: read_metric_facts(corpus, metric, config.fingerprints) for metric in config.metrics}
    former = _newest(corpus, config.name)
    scores = read_scores(corpus, facts)
    raw = {metric: np.concatenate([unit.raw[metric] for unit in scores]) for metric in config.metrics}
    skipped = _skipped(scores)
    if former is None:
        calibration = _calibration(corpus, config, raw, facts, skipped)
    else:
        calibration = _frozen(corpus, config, former, facts)
    quality = quality_of(calibration, raw)
    threshold = _threshold(str(config.hq_threshold), quality) if former is None else float(former["hq_threshold"])
    histogram = np.bincount(bins_of(quality[np.isfinite(quality)], config.bins), minlength=config.bins)
    present = {reference["path"] for reference in (former or {}).get("objects", ())}
    objects = _publish(corpus, config, calibration, scores, threshold, present)
    index = {
        "name": config.name,
        "metrics": {metric: found["fingerprint"] for metric, found in facts.items()},
        "calibration_name": calibration.name,
        "calibration": calibration.digest,
        "hq_threshold": threshold,
        "hq_threshold_rule": str(config.hq_threshold),
        "bins": config.bins,
        "manifest": corpus.manifest().digest,
        "labelled": int(np.isfinite(quality).sum()),
        "unlabelled": int((~np.isfinite(quality)).sum()),
        **_skipped_facts(skipped),
        **_retries_facts(scores),
        "hq_plus": int((quality > threshold).sum()),
        "histogram": [int(count) for count in histogram],
        "objects": [reference.to_dict() for reference in objects],
    }
    version = _write_index(corpus, index, former)
    if index["unlabelled"]:
        cause = f"a metric failed on {int((~np.isfinite(quality)).sum() - skipped.sum())} of them"
        if skipped.any():
            cause += f", a cascade kept one from {int(skipped.sum())}"
        log.warning("%d samples have no quality: %s", index["unlabelled"], cause)
    return LabelResult(
        corpus=corpus.storage.url,
        name=config.name,
        version=version,
        calibration=calibration.name,
        calibration_digest=calibration.digest,
        hq_threshold=threshold,
        labelled=int(np.isfinite(quality).sum()),
        unlabelled=int((~np.isfinite(quality)).sum()),
        skipped=int(skipped.sum()),
        hq_plus=int((quality > threshold).sum()),
        histogram=[int(count) for count in histogram],
    )


def _write_index(corpus: Corpus, index: Mapping[str, Any], former: Mapping[str, Any] | None) -> int:
    """Store an index as the next version, or find that the newest one is it; the version.

    Raises:
        UsageError: another process has just labelled otherwise.
    """
    version = 1
    if former is not None:
        version = version_of(former)
        if {key: value for key, value in former.items() if key not in _OF_VERSION} == json.loads(json.dumps(index)):
            return version
        version += 1
        index = {**index, "version": version, "grown_from": former["digest"]}
        log.info("labels %s: version %d, by the frozen calibration %s", index["name"], version, index["calibration"])
    own = digest(index)
    stored = write_document(corpus.storage, labels_index_path(str(index["name"]), version), {**index, "digest": own})
    if stored["digest"] != own:
        raise UsageError(
            f"The labels {index['name']} were made by another process meanwhile, from other scores or settings.",
            "Run the command again.",
        )
    return version


def _frozen(
    corpus: Corpus, config: LabelConfig, former: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]
) -> Calibration:
    """The calibration of the labels that have the name, for more samples.

    Raises:
        UsageError: those were made by other metrics or settings.
    """
    calibration = read_calibration(corpus, str(former["calibration_name"]))
    theirs: dict[str, Any] = {
        "metrics": former["metrics"],
        "bins": former["bins"],
        "hq_threshold": former["hq_threshold_rule"],
    }
    ours: dict[str, Any] = {
        "metrics": {metric: found["fingerprint"] for metric, found in facts.items()},
        "bins": config.bins,
        "hq_threshold": str(config.hq_threshold),
    }
    if config.reuse:
        theirs["reuse"], ours["reuse"] = calibration.name, config.reuse
    elif calibration.name == config.name:
        (kind,) = {found.kind for found in calibration.metrics.values()}
        knots = calibration.reference.get("knots", config.knots)
        theirs |= {"calibration": kind, "consensus": calibration.consensus is not None, "knots": knots}
        ours |= {"calibration": config.calibration, "consensus": config.consensus, "knots": config.knots}
    else:
        theirs["reuse"], ours["reuse"] = calibration.name, ""
    different = [f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in ours if theirs[name] != ours[name]]
    if different:
        raise UsageError(
            f"The corpus has labels called {config.name} with {'; '.join(different)}.",
            "Labels and calibrations are frozen: choose another name; --reuse keeps the scale of the former ones.",
        )
    return calibration


_OF_VERSION = ("digest", "version", "grown_from")
"""What two versions of an index differ in although they say the same."""


def version_of(index: Mapping[str, Any]) -> int:
    """Number of a set of labels under its name, from 1."""
    return int(index.get("version", 1))


def labels_facts(index: Mapping[str, Any]) -> dict[str, Any]:
    """What a document that was made from labels says of them."""
    facts = {"labels": index["name"], "labels_digest": index["digest"]}
    return facts if version_of(index) == 1 else {**facts, "labels_version": version_of(index)}


def read_label_index(corpus: Corpus, name: str) -> dict[str, Any]:
    """What the newest labels called ``name`` were made from, and their objects.

    Raises:
        UsageError: there are none; the message lists those there are.
    """
    index = _newest(corpus, name)
    if index is None:
        corpus.manifest()  # where there is no corpus, that is the first thing to say
        known = sorted({entry.path.split("/")[1] for entry in corpus.storage.list("labels")})
        raise UsageError(
            f"The corpus {corpus.storage.url} has no labels {name!r}.",
            f"Known: {', '.join(known) or 'none'}; jobs/label.py makes some.",
        )
    return index


def _newest(corpus: Corpus, name: str) -> dict[str, Any] | None:
    """By asking for one version after the other: there are few, and a listing would name every unit's table."""
    newest = None
    for version in itertools.count(1):
        try:
            newest = json.loads(corpus.storage.read(labels_index_path(name, version)))
        except FileNotFoundError:
            break
    return newest


def read_labels(corpus: Corpus, index: Mapping[str, Any]) -> pa.Table:
    """The rows of the labels of ``index`` (``layout.label_schema``).

    Raises:
        VerificationError: a table is not what the index says.
    """

    def read(reference: Mapping[str, Any]) -> pa.Table:
        return read_table(corpus, reference)

    tables = in_threads(read, index["objects"])
    schema = label_schema(tuple(index["metrics"]))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _calibration(
    corpus: Corpus,
    config: LabelConfig,
    raw: Mapping[str, NDArray[np.float64]],
    facts: Mapping[str, Mapping[str, Any]],
    skipped: NDArray[np.bool_],
) -> Calibration:
    """The calibration to use: fitted on these scores and stored, or the one to reuse.

    What a cascade skipped is no part of the reference of any metric: all maps rank within the same samples.
    """
    if not config.reuse:
        reference = {
            "manifest": corpus.manifest().digest,
            "samples": len(next(iter(raw.values()))),
            "knots": config.knots,
            **_skipped_facts(skipped),
        }
        calibration = fit_calibration(
            config.name,
            {metric: np.where(skipped, np.nan, scores) for metric, scores in raw.items()},
            facts,
            kind=config.calibration,
            knots=config.knots,
            even=config.consensus,
            reference=reference,
        )
        write_calibration(corpus, calibration)
        return calibration
    calibration = read_calibration(corpus, config.reuse)
    fingerprints = {metric: found["fingerprint"] for metric, found in facts.items()}
    if calibration.fingerprints != fingerprints:
        raise UsageError(
            f"Calibration {config.reuse} is of {calibration.fingerprints}, these scores are {fingerprints}.",
            "Label with the same metrics in the same editions, or fit a calibration.",
        )
    return calibration


def _skipped(scores: list[UnitScores]) -> NDArray[np.bool_]:
    """Whether a cascade kept a metric from each sample [N], in the order of the scores."""
    units = [
        np.any([np.array(found.to_pylist(), object) == SKIPPED for found in unit.statuses.values()], axis=0)
        for unit in scores
    ]
    return np.concatenate(units).astype(np.bool_) if units else np.zeros(0, np.bool_)


def _skipped_facts(skipped: NDArray[np.bool_]) -> dict[str, int]:
    """Nothing where no cascade skipped anything, as before there were cascades."""
    return {"skipped_cascade": int(skipped.sum())} if skipped.any() else {}


def _retries_facts(scores: list[UnitScores]) -> dict[str, Any]:
    """Unit -> metric -> which of its records of scores counted; nothing where no unit was scored again."""
    found = {unit.unit.unit_id: unit.retries for unit in scores if unit.retries}
    return {"retries": found} if found else {}


def quality_of(calibration: Calibration, raw: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float32]:
    """Quality [N] as it is stored, float32 in [0, 1); NaN where a metric failed."""
    return np.minimum(calibration.quality(raw), BELOW_ONE).astype(np.float32)


def _threshold(rule: str, quality: NDArray[np.float32]) -> float:
    """S_thr as a number."""
    match = _QUANTILE.match(rule)
    if match is None:
        return float(rule)
    finite = quality[np.isfinite(quality)]
    if not len(finite):
        raise UsageError("No sample has a quality, so hq_threshold has no quantile.", "See the scores.")
    return float(np.quantile(finite.astype(np.float64), float(match[1])))


def bins_of(quality: NDArray[np.float32], bins: int) -> NDArray[np.int32]:
    """Bin [N] of each quality: floor(bins * quality), at most ``bins - 1``."""
    return np.minimum(np.floor(quality.astype(np.float64) * bins), bins - 1).astype(np.int32)


def _publish(
    corpus: Corpus,
    config: LabelConfig,
    calibration: Calibration,
    scores: list[UnitScores],
    threshold: float,
    present: Container[str],
) -> list[ObjectRef]:
    """Store one label table per unit; those of a former version are ``present``."""
    footer = {"labels": config.name, "calibration": calibration.digest, "hq_threshold": repr(threshold)}

    def store(unit: UnitScores) -> ObjectRef:
        return publish_table(
            corpus.storage,
            _label_table(unit, calibration, threshold, config.bins),
            lambda sha256: labels_path(config.name, unit.unit.ordinal, sha256),
            footer,
            present,
        )

    return in_threads(store, scores)


def _label_table(unit: UnitScores, calibration: Calibration, threshold: float, bins: int) -> pa.Table:
    """``label_schema`` rows of one unit; null where a metric failed."""
    calibrated = calibration.calibrate(unit.raw)
    quality = quality_of(calibration, unit.raw)
    missing = ~np.isfinite(quality)
    columns: dict[str, Any] = {"key": unit.keys}
    for metric, values in calibrated.items():
        failed = ~np.isfinite(unit.raw[metric])
        columns[f"iqa_{metric}"] = pa.array(unit.raw[metric].astype(np.float32), mask=failed)
        columns[f"iqa_{metric}_cal"] = pa.array(values.astype(np.float32), mask=failed)
        columns[f"iqa_{metric}_status"] = unit.statuses[metric]
    spread = np.std(list(calibrated.values()), axis=0).astype(np.float32)
    columns["quality"] = pa.array(quality, mask=missing)
    columns["quality_std"] = pa.array(spread, mask=missing)
    columns["quality_bin"] = pa.array(bins_of(np.nan_to_num(quality), bins), mask=missing)
    columns["hq_plus"] = pa.array(quality > threshold, mask=missing)
    return pa.table(columns, schema=label_schema(tuple(calibrated)))
