import dataclasses
import functools
import json
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.commits.units import SchedulingConfig
from pipeline.gc import GcConfig, gc
from pipeline.layout import from_parquet
from pipeline.score import ScoreConfig, ScoringConfig, score
from pipeline.storage import Storage
from tests.chaos.conftest import Quiet
from tests.chaos.dies_at import DiesAt
from tests.chaos.invariants import Files, files, require_grown, require_whole
from tests.chaos.mortal_work import MortalScorer
from tests.chaos.processes import start

METRICS = ["rank", "rank_judge"]
RECORDS = "_commits/score-"
CHANGES = 3 + 2 + 2 * 2 * 2
"""A probe, what the fingerprints stand for, and of each of two units and metrics the table and the record."""


def _config(corpus: Storage) -> ScoreConfig:
    return ScoreConfig(corpus=corpus.url, metrics=METRICS, scheduling=SchedulingConfig(workers=0))


def _scores(found: Files) -> dict[str, list[dict[str, object]]]:
    """Metric and ordinal -> rows, but for the seconds that they took."""
    tables = {}
    for path, data in found.items():
        if path.startswith("scores/") and path.endswith(".parquet"):
            _, metric, _, name = path.split("/")
            rows = from_parquet(data).drop_columns(["seconds"]).to_pylist()
            tables[f"{metric} {name.partition('-')[0]}"] = rows
    return tables


@pytest.mark.slow
def test_a_scorer_that_dies_at_any_change_leaves_what_the_next_one_finishes(quiet: Quiet, folder: Path) -> None:
    source = Storage.open(str(quiet.source.parent / "corpus"))
    whole = Storage.open(str(shutil.copytree(source.url, folder / "whole")))
    score(_config(whole))
    expected = _scores(files(whole))
    assert len(expected) == 4
    change, ended = 0, -signal.SIGKILL
    while ended:
        change += 1
        corpus = Storage.open(str(shutil.copytree(source.url, folder / f"corpus-{change}")))
        moment = ("begun", "written", "made")[change % 3]
        ended = start(score, _config(corpus), folder / f"errors-{change}", prelude=DiesAt(change, moment)).end()
        assert ended in (0, -signal.SIGKILL)
        left = require_whole(corpus)
        committed = sum(json.loads(data)["samples"] for path, data in left.items() if path.startswith(RECORDS))
        again = score(_config(corpus))
        assert sum(found["scored"] for found in again.metrics.values()) == 6 * len(METRICS) - committed
        require_grown(left, files(corpus))
        gc(GcConfig(corpus=corpus.url, grace_hours=0.0, dry_run=False))
        assert _scores(require_whole(corpus)) == expected
    assert change - 1 == CHANGES


@pytest.mark.slow
def test_actors_that_die_between_two_metrics_of_a_unit_change_no_score(
    quiet: Quiet, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    source = Storage.open(str(quiet.source.parent / "corpus"))
    whole, torn = (Storage.open(str(shutil.copytree(source.url, folder / name))) for name in ("whole", "torn"))
    score(_config(whole))
    mortal = functools.partial(MortalScorer, deaths={0: (2, "made"), 1: (3, "written")}, graves=str(tmp_path))
    monkeypatch.setattr("pipeline.score.UnitScorer", mortal)
    on_ray = {"scheduling": SchedulingConfig(), "scoring": ScoringConfig(actors=2)}
    found = score(dataclasses.replace(_config(torn), **on_ray)).metrics
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    assert [found[name]["scored"] for name in METRICS] == [6, 6]
    gc(GcConfig(corpus=torn.url, grace_hours=0.0, dry_run=False))
    assert _scores(require_whole(torn)) == _scores(files(whole))
