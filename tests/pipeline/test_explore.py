"""What the explorer shows is what the corpus holds: choices, orders, figures, pictures, trials."""

import shlex
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy
from iqpir.restorer import Restorer
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.curate import CurateConfig, curate
from pipeline.explore import ExploreConfig, explore
from pipeline.exploring.catalogue import (
    Catalogue,
    choose,
    column,
    condition,
    curate_command,
    facts_of,
    figures,
    open_catalogue,
    picture_of,
    row_of,
    shown,
)
from pipeline.exploring.trial import AS_IT_IS, DEGRADATIONS, degraded, tried
from pipeline.label import LabelConfig, label
from pipeline.score import ScoreConfig, score
from pipeline.view import read_view
from tests.jobs.scripts import job
from tests.pipeline.drawn_corpus import drawn_corpus, drawn_picture
from tests.pipeline.tiny_checkpoint import write_checkpoint

METRICS = ["rank", "rank_judge"]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    corpus = drawn_corpus(tmp_path_factory.mktemp("explore"))
    url = corpus.storage.url
    score(ScoreConfig(corpus=url, metrics=METRICS, scheduling=SchedulingConfig(workers=0)))
    label(LabelConfig(corpus=url, metrics=METRICS))
    return open_catalogue(Corpus(url), "default", "", PixelPolicy())


def test_a_choice_is_the_view_that_its_command_makes(catalogue: Catalogue) -> None:
    where = condition("width >= 32", 0.25, 0.75)
    choice = choose(catalogue, where)
    python, script, *arguments = shlex.split(curate_command(catalogue, where))
    assert (python, script) == ("python", "jobs/curate.py")
    config = CurateConfig(corpus=catalogue.corpus.storage.url, name="my-view", where=where)
    assert job("curate").parse(*arguments) == config
    view = read_view(catalogue.corpus, curate(config).view)
    assert sorted(view.table["key"].to_pylist()) == choice.table["key"].to_pylist()
    assert 0 < choice.table.num_rows < catalogue.table.num_rows and choice.chosen.sum() == choice.table.num_rows


@pytest.mark.parametrize(
    ("where", "low", "high", "expected"),
    [
        ("true", 0.0, 1.0, "true"),
        (" ", 0.0, 1.0, "true"),
        ("true", 0.5, 1.0, "quality between 0.5 and 1"),
        ("a or b", 0.0, 0.25, "(a or b) and quality between 0 and 0.25"),
    ],
)
def test_sliders_add_to_the_condition(where: str, low: float, high: float, expected: str) -> None:
    assert condition(where, low, high) == expected


def test_orders(catalogue: Catalogue) -> None:
    choice = choose(catalogue, "true")
    quality = column(choice.table, "quality")
    best = [row["quality"] for row in shown(choice, "best", 5)]
    assert best == sorted(quality, reverse=True)[:5]
    assert [row["quality"] for row in shown(choice, "worst", 5)] == sorted(quality)[:5]
    even = [row["quality"] for row in shown(choice, "even", 5)]
    assert even == sorted(even) and (even[0], even[-1]) == (quality.min(), quality.max()) and len(set(even)) == 5
    spread = [row["quality_std"] for row in shown(choice, "disagreement", 5)]
    assert spread == sorted(column(choice.table, "quality_std"), reverse=True)[:5]
    assert len(shown(choice, "even", 99)) == catalogue.table.num_rows
    nothing = choose(catalogue, "quality > 2")
    assert shown(nothing, "even", 5) == [] and figures(catalogue, nothing)["chosen"].startswith("0 of 16")


def test_figures_are_of_the_choice(catalogue: Catalogue) -> None:
    choice = choose(catalogue, f"quality > {catalogue.threshold}")
    found = figures(catalogue, choice)
    assert found["HQ+"].startswith("100% ") and found["chosen"].startswith(f"{choice.table.num_rows} of 16 ")
    quality = column(choice.table, "quality")
    assert found["quality"] == f"mean {quality.mean():.3f}, from {quality.min():.3f} to {quality.max():.3f}"


def test_a_wrong_condition_lists_the_columns(catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match=r"qualty.*Columns: .*quality"):
        choose(catalogue, "qualty > 0.5")


def test_a_sample_is_shown_with_its_scores_and_its_own_pixels(catalogue: Catalogue) -> None:
    (row,) = shown(choose(catalogue, "relpath = '02-0.png'"), "best", 5)
    assert row_of(catalogue, row["key"]) == row
    np.testing.assert_array_equal(picture_of(catalogue, row), drawn_picture(2))
    assert picture_of(catalogue, row, 16).shape == (16, 16, 3)
    facts = dict(facts_of(catalogue, row))
    assert facts["relpath"] == "02-0.png" and facts["quality"] == f"{row['quality']:.4g}"
    assert facts["rank"] == f"{row['iqa_rank_cal']:.4g} (raw {row['iqa_rank']:.4g})"
    with pytest.raises(UsageError, match="no-such-key"):
        row_of(catalogue, "no-such-key")


def test_a_trial_restores_what_it_shows_as_degraded(tmp_path: Path) -> None:
    restorer = Restorer.load(write_checkpoint(tmp_path))
    picture = drawn_picture(1)
    before, after = tried(restorer, picture, "tiny32", 3, 0.7, 0.0)
    np.testing.assert_array_equal(before, degraded(picture, "tiny32", 3, restorer.image_size))
    np.testing.assert_array_equal(after, restorer.restore(before, 0.7))
    assert not np.array_equal(before, picture)
    assert not np.array_equal(before, degraded(picture, "tiny32", 4, restorer.image_size))
    assert degraded(picture, AS_IT_IS, 0, 32) is picture
    for preset in DEGRADATIONS:
        assert degraded(picture, preset, 0, 32).shape == picture.shape


def test_without_gradio_one_line_says_how_to_get_it(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as Python has it where the package is absent
    with pytest.raises(UsageError, match=r"pip install iqpir\[app\]"):
        explore(ExploreConfig(corpus=catalogue.corpus.storage.url, port=0))


def test_a_taken_port_is_said_before_anything_is_read() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"Cannot listen on 127\.0\.0\.1:{port}.*--port"):
            explore(ExploreConfig(corpus="/no/such/corpus", port=port))
