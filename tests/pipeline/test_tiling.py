"""Tiles cover a picture, their statistics are stored, and what does not fit into memory is cut."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iqpir.errors import UsageError
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.label import LabelConfig, label
from pipeline.layout import TILED_SCORES, from_parquet
from pipeline.metrics import find_metrics
from pipeline.score import ScoreConfig, score
from pipeline.scoring.batches import LoadedMetric, score_batch, score_pictures
from pipeline.scoring.tiling import Picture, TilingPolicy, combine, cut
from tests.pipeline.drawn_corpus import drawn_corpus

ALONE = SchedulingConfig(workers=0)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 39))
def test_tiles_of_equal_size_cover_every_pixel(height: int, width: int, size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    picture = np.arange(height * width, dtype=np.int64).reshape(height, width, 1)
    tiles = cut(picture, TilingPolicy(size=size, overlap=overlap))  # type: ignore[arg-type]
    assert {tile.shape[:2] for tile in tiles} == {(min(size, height), min(size, width))}
    assert set(np.concatenate([tile.ravel() for tile in tiles]).tolist()) == set(range(height * width))
    stride = size - overlap
    for side, length in ((0, height), (1, width)):
        starts = sorted({int(tile[0, 0, 0]) // width if side == 0 else int(tile[0, 0, 0]) % width for tile in tiles})
        assert all(b - a <= stride for a, b in itertools.pairwise(starts)) and starts[0] == 0, length


def test_p10_and_min_count_from_the_worse_end() -> None:
    values = [float(value) for value in range(11)]
    higher, lower = combine(values, "higher"), combine(values, "lower")
    assert (higher.tiles, higher.mean, higher.p10, higher.min) == (11, 5.0, 1.0, 0.0)
    assert (lower.mean, lower.p10, lower.min) == (5.0, 9.0, 10.0)
    assert [higher.chosen(name) for name in ("mean", "p10", "min")] == [5.0, 1.0, 0.0]


def _mean(pictures: Tensor) -> Tensor:
    return pictures.mean((1, 2, 3))


def _loaded(scorer: object) -> LoadedMetric:
    return LoadedMetric(find_metrics(["rank"])[0], scorer, "cpu")  # type: ignore[arg-type]


def test_a_picture_with_one_bad_corner_says_so_in_p10_and_min_and_tiles_fill_batches() -> None:
    picture = np.full((64, 96, 3), 204, np.uint8)
    picture[:32, :32] = 0
    sizes: list[int] = []

    def watching(pictures: Tensor) -> Tensor:
        sizes.append(len(pictures))
        return _mean(pictures)

    policy = TilingPolicy(size=32, aggregate="min")
    found = score_pictures(_loaded(watching), [picture, picture], policy, 5 * 32 * 32)
    assert sizes == [5, 5, 2]
    assert [scored.raw for scored in found] == [0.0, 0.0]
    tiles = found[0].tiles
    assert tiles is not None and tiles.tiles == 6
    assert tiles.mean == pytest.approx(0.8 * 5 / 6) and tiles.p10 == pytest.approx(0.4)


def test_a_tile_that_fails_fails_its_own_sample_only() -> None:
    def fragile(pictures: Tensor) -> Tensor:
        if bool((_mean(pictures) == 1).any()):
            raise RuntimeError("no convergence")
        return _mean(pictures)

    good: Picture = np.full((32, 64, 3), 51, np.uint8)
    bad = good.copy()
    bad[:, 32:] = 255
    found = score_pictures(_loaded(fragile), [good, bad], TilingPolicy(size=32), 1 << 20)
    assert [scored.status for scored in found] == ["success", "failed_metric"]
    assert found[1].tiles is None


def test_a_single_picture_that_does_not_fit_is_tiled_and_marked() -> None:
    def hungry(pictures: Tensor) -> Tensor:
        if pictures.shape[0] * pictures.shape[2] * pictures.shape[3] > 300 * 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _mean(pictures)

    large: Picture = np.full((600, 1000, 3), 102, np.uint8)
    found = score_batch(_loaded(hungry), [large])[0]
    assert (found.status, found.error_code) == ("success_tiled", "tiles_250")
    assert found.raw == pytest.approx(0.4) and found.tiles is not None and found.tiles.tiles == 12

    def starving(pictures: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert score_batch(_loaded(starving), [large])[0].status == "failed_out_of_memory"


def test_tiled_scores_are_an_edition_of_their_own_with_all_three_statistics(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1, side=64)
    whole = _score(corpus, TilingPolicy())
    editions = {whole}
    for tiling in (TilingPolicy(size=32), TilingPolicy(size=32, overlap=8), TilingPolicy(size=32, aggregate="p10")):
        fingerprint = _score(corpus, tiling)
        path = next(e.path for e in corpus.storage.list(f"scores/rank/{fingerprint}") if e.path.endswith(".parquet"))
        table = from_parquet(corpus.storage.read(path))
        assert table.schema.equals(TILED_SCORES, check_metadata=False)
        for row in table.to_pylist():
            assert row["raw"] == row[f"tile_{tiling.aggregate}"]
            assert row["tile_min"] <= row["tile_p10"] <= row["tile_mean"]
            assert row["tiles"] == (9 if tiling.overlap else 4)
        editions.add(fingerprint)
    assert len(editions) == 4
    with pytest.raises(UsageError, match="editions"):
        label(LabelConfig(corpus=corpus.storage.url, metrics=["rank"]))
    labels = LabelConfig(corpus=corpus.storage.url, metrics=["rank"], fingerprints={"rank": fingerprint})
    assert label(labels).labelled == 4


def _score(corpus: Corpus, tiling: TilingPolicy) -> str:
    config = ScoreConfig(corpus=corpus.storage.url, metrics=["rank"], tiling=tiling, scheduling=ALONE)
    return str(score(config).metrics["rank"]["fingerprint"])


@pytest.mark.parametrize(("size", "overlap"), [(-1, 0), (32, 32), (32, -1)])
def test_tiles_that_do_not_advance_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="tiling"):
        TilingPolicy(size=size, overlap=overlap)
