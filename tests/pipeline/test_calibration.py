"""Calibrations are monotone, frozen, safe outside their range, and the same for labels and for losses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqpir.errors import UsageError, VerificationError
from iqpir.quality_prior import PiecewiseLinear
from pipeline.corpus import Corpus
from pipeline.scoring.calibration import Calibration, fit_calibration, fit_map, read_calibration, write_calibration

HIGHER = {"direction": "higher", "score_range": [0.0, 1.0], "fingerprint": "f1"}
LOWER = {"direction": "lower", "score_range": None, "fingerprint": "f2"}


def _calibration(rng: np.random.Generator, name: str = "test", count: int = 500) -> Calibration:
    raw = {"sharp": rng.normal(0, 1, count), "dirt": rng.gamma(2.0, 3.0, count)}
    return fit_calibration(name, raw, {"sharp": HIGHER, "dirt": LOWER}, kind="ecdf", reference={})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=60),
    st.sampled_from(["higher", "lower"]),
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20),
)
def test_an_ecdf_of_any_reference_is_monotone_and_strictly_inside(
    reference: list[float], direction: str, probes: list[float]
) -> None:
    mapping = fit_map(np.array(reference), "ecdf", "lower" if direction == "lower" else "higher")
    assert all(0 < value < 1 for value in mapping.values)
    mapped = mapping(np.sort(probes))
    assert ((mapped > 0) & (mapped < 1)).all()
    steps = np.diff(mapped) if direction == "higher" else -np.diff(mapped)
    assert (steps >= -1e-9).all()


def test_an_ecdf_spreads_any_distribution_evenly(rng: np.random.Generator) -> None:
    scores = np.exp(rng.normal(0, 2, 5000))
    mapped = fit_map(scores, "ecdf", "higher", knots=65)(scores)
    counts = np.bincount(np.floor(mapped * 10).astype(int), minlength=10)
    assert counts.min() > 400
    assert counts.max() < 600


def test_quality_fills_ten_bins_evenly_although_the_mean_does_not(rng: np.random.Generator) -> None:
    raw = {"sharp": rng.normal(0, 1, 4000), "dirt": rng.normal(0, 1, 4000)}
    calibration = fit_calibration("c", raw, {"sharp": HIGHER, "dirt": LOWER}, kind="ecdf", reference={})
    mean = np.mean(list(calibration.calibrate(raw).values()), axis=0)
    uneven = np.bincount(np.floor(mean * 10).astype(int), minlength=10)
    even = np.bincount(np.floor(calibration.quality(raw) * 10).astype(int), minlength=10)
    assert uneven.min() < 200
    assert even.min() > 320
    assert even.max() < 480


def test_a_part_of_the_metrics_gives_their_plain_mean(rng: np.random.Generator) -> None:
    calibration = _calibration(rng)
    raw = {"sharp": np.array([-1.0, 0.0, 2.0])}
    np.testing.assert_array_equal(calibration.quality(raw), calibration.calibrate(raw)["sharp"])


def test_lower_is_better_is_turned_round(rng: np.random.Generator) -> None:
    calibrated = _calibration(rng).calibrate({"dirt": np.array([0.5, 5.0, 50.0])})["dirt"]
    assert calibrated[0] > calibrated[1] > calibrated[2]


def test_minmax_is_the_papers_and_range_needs_a_range() -> None:
    scores = np.array([2.0, 4.0, 6.0])
    np.testing.assert_allclose(fit_map(scores, "minmax", "higher")(scores), (scores - 2) / (4 + 1e-6))
    np.testing.assert_allclose(fit_map(scores, "range", "lower", score_range=(0, 10))(scores), [0.8, 0.6, 0.4])
    with pytest.raises(UsageError, match="declares no range"):
        fit_map(scores, "range", "lower", metric="dirt")


def test_values_stay_below_one_so_that_the_last_bin_exists() -> None:
    mapped = fit_map(np.array([0.0, 1.0]), "range", "higher", score_range=(0, 1))(np.array([1.0, 99.0]))
    assert (mapped.astype(np.float32) < 1).all()


def test_a_constant_metric_says_nothing() -> None:
    assert fit_map(np.full(9, 3.0), "ecdf", "higher")(3.0) == pytest.approx(0.5)


def test_failed_scores_stay_missing(rng: np.random.Generator) -> None:
    raw = {"sharp": np.array([0.0, np.nan]), "dirt": np.array([1.0, 1.0])}
    assert np.isnan(_calibration(rng).quality(raw)).tolist() == [False, True]


def test_loss_and_labels_use_one_map(rng: np.random.Generator) -> None:
    found = _calibration(rng).metrics["sharp"]
    scores = rng.normal(0, 4, 200)
    module = PiecewiseLinear(found.knots, found.values)(torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(found(scores), module, atol=1e-7)


def test_a_stored_calibration_comes_back_and_is_frozen(tmp_path: Path, rng: np.random.Generator) -> None:
    corpus, calibration = Corpus(str(tmp_path)), _calibration(rng)
    write_calibration(corpus, calibration)
    write_calibration(corpus, calibration)
    assert read_calibration(corpus, "test") == calibration
    with pytest.raises(UsageError, match="another calibration called test"):
        write_calibration(corpus, _calibration(rng))


def test_a_changed_calibration_is_found_out(tmp_path: Path, rng: np.random.Generator) -> None:
    corpus, calibration = Corpus(str(tmp_path)), _calibration(rng)
    write_calibration(corpus, calibration)
    path = tmp_path / "calibrations" / "test.json"
    path.write_text(path.read_text().replace(repr(calibration.metrics["sharp"].knots[3]), "-0.123", 1))
    with pytest.raises(VerificationError, match="digest"):
        read_calibration(corpus, "test")


def test_a_missing_calibration_and_an_unknown_metric_name_what_there_is(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    corpus, calibration = Corpus(str(tmp_path)), _calibration(rng)
    write_calibration(corpus, calibration)
    with pytest.raises(UsageError, match="Known: test"):
        read_calibration(corpus, "tset")
    with pytest.raises(UsageError, match="sharp, dirt"):
        calibration.quality({"musiq": np.zeros(2)})
