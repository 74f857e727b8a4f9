"""A cheap metric decides what a dear one sees; whoever is skipped has a row, and labels say so."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from iqpir.errors import UsageError
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.curate import CurateConfig, curate
from pipeline.label import LabelConfig, label, read_label_index, read_labels
from pipeline.layout import from_parquet
from pipeline.metrics import find_metrics
from pipeline.score import ScoreConfig, ScoreResult, score
from pipeline.scoring.calibration import read_calibration
from pipeline.scoring.cascade import Gate, Term, in_order, parse_cascade
from pipeline.verify import VerifyConfig, verify
from tests.pipeline.drawn_corpus import drawn_corpus

ALONE = SchedulingConfig(workers=0)
METRICS = ["rank", "rank_judge"]


def _score(corpus: Corpus, **changed: object) -> ScoreResult:
    settings = {"metrics": METRICS, "scheduling": ALONE, **changed}
    return score(ScoreConfig(corpus=corpus.storage.url, **settings))  # type: ignore[arg-type]


def _rows(corpus: Corpus, metric: str, fingerprint: str) -> dict[str, dict[str, object]]:
    paths = [e.path for e in corpus.storage.list(f"scores/{metric}/{fingerprint}") if e.path.endswith(".parquet")]
    return {row["key"]: row for path in paths for row in from_parquet(corpus.storage.read(path)).to_pylist()}


def _median(corpus: Corpus) -> tuple[float, dict[str, dict[str, object]]]:
    """Of the cheap metric's scores, and those scores."""
    fingerprint = _score(corpus, metrics=["rank"]).metrics["rank"]["fingerprint"]
    rows = _rows(corpus, "rank", fingerprint)
    return float(np.median([row["raw"] for row in rows.values()])), rows


@pytest.mark.parametrize("cheap_first", [True, False], ids=["cheap scores are there", "both in one pass"])
def test_only_samples_that_pass_are_scored_and_the_others_have_a_row(tmp_path: Path, cheap_first: bool) -> None:
    corpus = drawn_corpus(tmp_path / "a", count=4, side=32)
    median, cheap = _median(corpus)
    whole = _rows(corpus, "rank_judge", _score(corpus, metrics=METRICS).metrics["rank_judge"]["fingerprint"])
    if not cheap_first:
        corpus = drawn_corpus(tmp_path / "b", count=4, side=32)
    found = _score(corpus, cascade={"rank_judge": f"rank > {median}"}).metrics["rank_judge"]
    assert (found["scored"], found["failed"], found["skipped"]) == (8, 0, 8)
    rows = _rows(corpus, "rank_judge", found["fingerprint"])
    assert len(rows) == 16
    for key, row in rows.items():
        if cheap[key]["raw"] > median:  # type: ignore[operator]
            assert row["status"] == "success" and row["raw"] == pytest.approx(whole[key]["raw"], abs=1e-5)
        else:
            assert (row["status"], row["error_code"], row["raw"]) == ("skipped_cascade", "by_rank", None)
    verify(VerifyConfig(corpus=corpus.storage.url))


def test_the_cascade_is_part_of_the_fingerprint_of_the_dear_metric_only(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1, side=32)
    plain = _score(corpus).metrics
    gated = _score(corpus, cascade={"rank_judge": "rank > -100"}).metrics
    other = _score(corpus, cascade={"rank_judge": "rank > -99"}).metrics
    assert plain["rank"]["fingerprint"] == gated["rank"]["fingerprint"]
    assert gated["rank"]["scored"] == 0
    assert len({found["rank_judge"]["fingerprint"] for found in (plain, gated, other)}) == 3
    again = _score(corpus, cascade={"rank_judge": "rank > -100"})
    assert again.skipped_units == len(corpus.manifest().units)


def test_nothing_is_read_where_earlier_scores_refuse_every_sample(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1, side=32)
    _score(corpus, metrics=["rank"])
    for shard in (tmp_path / "corpus" / "shards").iterdir():
        shard.unlink()
    found = _score(corpus, cascade={"rank_judge": "rank > 1e9"}).metrics["rank_judge"]
    assert (found["scored"], found["skipped"]) == (0, 4)


def test_labels_say_who_was_skipped_and_rank_within_the_others(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=10, side=32, unit_samples=15)
    median, cheap = _median(corpus)
    fingerprint = _score(corpus, cascade={"rank_judge": f"rank > {median}"}).metrics["rank_judge"]["fingerprint"]
    result = label(LabelConfig(corpus=corpus.storage.url, metrics=METRICS))
    assert (result.labelled, result.unlabelled, result.skipped) == (20, 20, 20)
    index = read_label_index(corpus, "default")
    assert index["skipped_cascade"] == 20 and index["metrics"]["rank_judge"] == fingerprint
    assert read_calibration(corpus, "default").reference["skipped_cascade"] == 20
    table = read_labels(corpus, index).to_pylist()
    for row in table:
        skipped = cheap[row["key"]]["raw"] <= median  # type: ignore[operator]
        assert (row["iqa_rank_judge_status"] == "skipped_cascade") == skipped
        assert (row["quality"] is None) == skipped and row["iqa_rank"] is not None
    seen = np.array([row["iqa_rank_cal"] for row in table if row["quality"] is not None])
    assert 0.45 < float(np.median(seen)) < 0.55
    assert max(result.histogram) <= 4
    view = curate(CurateConfig(corpus=corpus.storage.url, name="all"))
    assert (view.samples, view.unlabelled) == (20, 20)


def test_every_file_of_scores_says_where_its_numbers_come_from(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1, side=32)
    found = _score(corpus, cascade={"rank_judge": "rank > -100"}).metrics["rank_judge"]
    folder = tmp_path / "corpus" / "scores" / "rank_judge" / found["fingerprint"]
    footer = pq.read_schema(next(folder.glob("*.parquet"))).metadata
    said = json.loads(footer[b"provenance"])
    assert footer[b"fingerprint"].decode() == said["fingerprint"] == found["fingerprint"]
    assert len(said["weights_sha256"]) == 64 and said["version"] and said["pixels"]
    assert (said["dtype"], said["device"], said["batch"]) == ("float32", "cpu", {"pixels": 1 << 18, "pictures": "many"})
    assert said["torch"] == torch.__version__ and said["licence"] == find_metrics(["rank_judge"])[0].licence
    assert said["cascade"][0]["metric"] == "rank" and said["cascade"][0]["threshold"] == -100


@pytest.mark.parametrize(
    ("cascade", "message"),
    [
        ({"rank_judge": "rank"}, "no condition"),
        ({"rank_judge": "rank > 0.3 or rank < 0.1"}, "no condition"),
        ({"musiq": "rank > 0.3"}, "names musiq"),
        ({"rank_judge": "piqe < 3"}, "names piqe"),
        ({"rank_judge": "rank > 0", "rank": "rank_judge > 0"}, "circle"),
        ({"rank": "rank > 0"}, "circle"),
    ],
)
def test_a_cascade_that_means_nothing_is_refused_before_any_work(cascade: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ScoreConfig(corpus="x", metrics=METRICS, cascade=cascade)


def test_conditions_are_read_and_a_missing_score_skips() -> None:
    gate = parse_cascade({"c": "a >= -1.5e-1 and b < 2"}, ["c", "a", "b"])["c"]
    assert gate.terms == (Term("a", ">=", -0.15), Term("b", "<", 2.0))
    assert gate.refusal({"a": -0.15, "b": 1.9}) == ""
    assert gate.refusal({"a": -0.16, "b": 1.9}) == "by_a"
    assert gate.refusal({"a": 0.0, "b": None}) == "no_b"
    assert in_order(["c", "a", "b"], {"c": gate, "a": Gate((Term("b", ">", 0.0),))}) == ["b", "a", "c"]
