"""Raw scores of good pictures crowd two of ten bins; calibrated quality fills all ten evenly.

The real tables are two of the 70,000 FFHQ pictures (``FFHQ_score_topiq_nr-face.csv``, ``FFHQ_512_score_80.csv``);
the test of them runs where ``shared/data`` beside the checkout, or the folder that ``IQPIR_FFHQ_SCORES`` names, holds
both, at any depth.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.label import bins_of, quality_of
from pipeline.scoring.calibration import fit_calibration

TABLES = {"topiq_nr-face": "FFHQ_score_topiq_nr-face.csv", "musiq": "FFHQ_512_score_80.csv"}
FACTS = {"direction": "higher", "score_range": [0.0, 1.0], "fingerprint": "f"}
BINS = 10
FFHQ_SCORES = Path(os.environ.get("IQPIR_FFHQ_SCORES") or Path(__file__).resolve().parents[3] / "shared" / "data")
Values = NDArray[np.float64]


def _crowded(rng: np.random.Generator, count: int = 20_000) -> dict[str, Values]:
    """Two metrics that agree in part, with nine of ten scores between 0.7 and 0.9."""
    common = rng.normal(0, 1, count)
    raw = {}
    for name, centre in (("musiq", 0.815), ("topiq_nr-face", 0.8)):
        mixed = 0.6 * common + 0.8 * rng.normal(0, 1, count)
        raw[name] = np.clip(centre + 0.045 * mixed - 0.02 * rng.exponential(0.5, count), 0.0, 0.999)
    return raw


def _tables(folder: Path) -> dict[str, Values]:
    """Both tables, for the pictures that both have."""
    columns: dict[str, dict[str, float]] = {}
    for metric, name in TABLES.items():
        with next(folder.rglob(name)).open(newline="") as file:
            rows = [row for row in csv.reader(file) if row and row[0].endswith(".png")]
        columns[metric] = {row[0]: float(row[1]) for row in rows}
    shared = sorted(set.intersection(*(set(column) for column in columns.values())))
    return {metric: np.array([column[key] for key in shared]) for metric, column in columns.items()}


def _share_of_two_bins(raw: Values) -> float:
    """Share of the pictures in the two fullest of ten bins of equal width, as the raw score has it."""
    counts = np.bincount(np.floor(raw * BINS).astype(int).clip(0, BINS - 1), minlength=BINS)
    return float(np.sort(counts)[-2:].sum() / counts.sum())


def _counts(raw: dict[str, Values]) -> NDArray[np.int64]:
    """Pictures in each bin of the quality that labels store."""
    calibration = fit_calibration("c", raw, dict.fromkeys(raw, FACTS), kind="ecdf", reference={})
    return np.bincount(bins_of(quality_of(calibration, raw), BINS), minlength=BINS)


def _require_even(raw: dict[str, Values]) -> None:
    counts = _counts(raw)
    mean = counts.sum() / BINS
    assert len(counts) == BINS
    assert counts.min() >= 0.8 * mean and counts.max() <= 1.2 * mean, counts


def test_crowded_scores_fill_ten_bins_evenly(rng: np.random.Generator) -> None:
    raw = _crowded(rng)
    assert _share_of_two_bins(raw["musiq"]) > 0.85
    _require_even(raw)


def test_the_scores_of_ffhq_fill_ten_bins_evenly() -> None:
    absent = [name for name in TABLES.values() if next(FFHQ_SCORES.rglob(name), None) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not below {FFHQ_SCORES}; IQPIR_FFHQ_SCORES may name another folder")
    raw = _tables(FFHQ_SCORES)
    assert len(raw["musiq"]) > 69_000
    assert _share_of_two_bins(raw["musiq"]) > 0.85
    _require_even(raw)
