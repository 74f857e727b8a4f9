"""Metrics that score as they did pass the gate; other weights are found out, named and measured."""

import shutil
import sys
from pathlib import Path

import pytest

from iqpir.errors import PermanentError, UsageError, VerificationError
from iqpir.pixels import PixelPolicy
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.label import LabelConfig, label, label_or_check
from pipeline.score import ScoreConfig, score
from pipeline.scoring.calibration import read_calibration
from pipeline.scoring.drift import DriftPolicy, DriftResult, require_current_metrics
from pipeline.scoring.score_unit import load_metric, prove_metrics
from pipeline.scoring.tiling import TilingPolicy
from tests.pipeline.drawn_corpus import drawn_corpus
from tests.pipeline.metric_plugin import install, set_weights

METRICS = ["rank", "colour"]
ALONE = SchedulingConfig(workers=0)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, "colour_metric", raising=False)
    install(tmp_path / "plugin", monkeypatch)
    return tmp_path / "plugin"


def _labelled(folder: Path, **changed: object) -> Corpus:
    corpus = drawn_corpus(folder, count=6, side=32, unit_samples=10)
    settings = {"metrics": METRICS, "scheduling": ALONE, **changed}
    score(ScoreConfig(corpus=corpus.storage.url, **settings))  # type: ignore[arg-type]
    label(LabelConfig(corpus=corpus.storage.url, metrics=METRICS))
    return corpus


def _check(corpus: Corpus, canaries: int = 16, **limits: float) -> DriftResult:
    policy = DriftPolicy(canaries=canaries, **limits)
    result = label_or_check(LabelConfig(corpus=corpus.storage.url, check=True, drift=policy))
    assert isinstance(result, DriftResult)
    return result


def test_equal_metrics_have_not_drifted_and_nothing_is_written(tmp_path: Path, plugin: Path) -> None:
    corpus = _labelled(tmp_path / "c")
    before = {entry.path: entry.etag for entry in corpus.storage.list()}
    result = _check(corpus)
    assert (result.canaries, set(result.metrics)) == (16, set(METRICS))
    for drift in result.metrics.values():
        assert drift.rank_correlation == 1.0 and drift.same_weights and drift.lost == 0
        assert drift.max_change < 1e-3
    assert {entry.path: entry.etag for entry in corpus.storage.list()} == before
    assert _check(corpus, canaries=1000).canaries == 24


def test_other_weights_are_refused_by_name_and_amount_and_mild_ones_by_the_limits(tmp_path: Path, plugin: Path) -> None:
    corpus = _labelled(tmp_path / "c")
    set_weights(plugin, [-1.0, 3.0, -1.0])
    with pytest.raises(VerificationError, match=r"colour \(other weights or version\): .*score changed by 0"):
        _check(corpus)
    set_weights(plugin, [1.0, 1.0, 1.0001])
    drift = _check(corpus, max_change=0.2).metrics["colour"]
    assert 0 < drift.max_raw_change < 1e-3 and drift.changed > 0
    assert not drift.same_weights
    with pytest.raises(VerificationError, match=r"rank correlation .* is below 1"):
        set_weights(plugin, [-1.0, -1.0, -1.0])
        _check(corpus, max_change=1.0, min_rank_correlation=1.0)


def test_the_canaries_are_scored_as_the_stored_scores_were(tmp_path: Path, plugin: Path) -> None:
    """In the tiles and under the pixel policy that they were made with; skipped samples stay skipped."""
    corpus = _labelled(
        tmp_path / "c",
        tiling=TilingPolicy(size=16, aggregate="min"),
        pixels=PixelPolicy(background=(0, 0, 0)),
        cascade={"colour": "rank > 0.2"},
    )
    result = _check(corpus, canaries=24)
    assert all(drift.changed == 0 and drift.lost == 0 for drift in result.metrics.values())


def test_a_calibration_of_other_weights_is_refused_before_it_is_used(tmp_path: Path, plugin: Path) -> None:
    corpus = _labelled(tmp_path / "c")
    calibration = read_calibration(corpus, "default")

    def scorers() -> dict[str, object]:
        return {name: load_metric(name, "cpu", "").scorer for name in METRICS}

    require_current_metrics(corpus, calibration, scorers())  # type: ignore[arg-type]
    set_weights(plugin, [1.0, 1.0, 1.5])
    with pytest.raises(VerificationError, match="other scores of colour: weights_sha256 differ"):
        require_current_metrics(corpus, calibration, scorers())  # type: ignore[arg-type]


def test_a_calibration_of_tiled_scores_is_refused_for_whole_pictures(tmp_path: Path, plugin: Path) -> None:
    corpus = _labelled(tmp_path / "c", tiling=TilingPolicy(size=16))
    scorers = {"rank": load_metric("rank", "cpu", "").scorer}
    with pytest.raises(VerificationError, match="in tiles"):
        require_current_metrics(corpus, read_calibration(corpus, "default"), scorers)


def test_a_worker_with_other_weights_than_the_driver_scores_nothing(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver declares what it has; the weights change before the work begins, as on another machine."""
    corpus = drawn_corpus(tmp_path / "c", count=1, side=32)

    def declare_then_change(*arguments: object, **named: object) -> dict[str, dict[str, object]]:
        found = prove_metrics(*arguments, **named)  # type: ignore[arg-type]
        set_weights(plugin, [2.0, 1.0, 1.0])
        return found

    monkeypatch.setattr("pipeline.score.prove_metrics", declare_then_change)
    with pytest.raises(PermanentError, match="colour has the weights"):
        score(ScoreConfig(corpus=corpus.storage.url, metrics=["colour"], scheduling=ALONE))
    assert not [entry for entry in corpus.storage.list("scores") if entry.path.endswith(".parquet")]


def test_what_cannot_be_checked_says_so(tmp_path: Path, plugin: Path) -> None:
    corpus = _labelled(tmp_path / "c")
    with pytest.raises(UsageError, match="no calibration 'other'"):
        label_or_check(LabelConfig(corpus=corpus.storage.url, check=True, reuse="other"))
    with pytest.raises(UsageError, match="canaries 2"):
        DriftPolicy(canaries=2)
    shutil.rmtree(plugin)
    load_metric.cache_clear()
    sys.modules.pop("colour_metric")
    with pytest.raises(UsageError, match="Unknown metric 'colour'"):
        _check(corpus)
