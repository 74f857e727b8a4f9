"""Labels: every sample one row, evenly filled bins, a stated HQ+ threshold, and calibrations to reuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from iqpir.errors import IncompleteError, UsageError, VerificationError
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.curate import CurateConfig, curate
from pipeline.label import LabelConfig, LabelResult, label, read_label_index, read_labels
from pipeline.layout import from_parquet, label_schema, labels_index_path, scores_path
from pipeline.score import ScoreConfig, score
from pipeline.scoring.calibration import read_calibration
from pipeline.shard import ShardConfig, shard
from pipeline.verify import VerifyConfig, verify
from pipeline.view import read_view
from tests.pipeline.drawn_corpus import drawn_corpus, drawn_picture

METRICS = ["rank", "rank_judge"]
ALONE = SchedulingConfig(workers=0)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    corpus = drawn_corpus(folder, count=10, side=32, unit_samples=15)
    score(ScoreConfig(corpus=corpus.storage.url, metrics=METRICS, scheduling=ALONE))
    return folder / "corpus"


@pytest.fixture
def corpus(scored: Path, tmp_path: Path) -> Corpus:
    """A copy that a test may change."""
    shutil.copytree(scored, tmp_path / "corpus")
    return Corpus(str(tmp_path / "corpus"))


def _label(corpus: Corpus, **settings: object) -> LabelResult:
    return label(LabelConfig(corpus=corpus.storage.url, **{"metrics": METRICS, **settings}))  # type: ignore[arg-type]


def _table(corpus: Corpus, name: str = "default") -> pa.Table:
    return read_labels(corpus, read_label_index(corpus, name))


def test_every_sample_has_one_label_and_better_pictures_more_quality(corpus: Corpus) -> None:
    result = _label(corpus)
    table = _table(corpus)
    assert table.schema.equals(label_schema(tuple(METRICS)), check_metadata=False)
    joined = corpus.samples(["key", "relpath"]).join(table, "key", join_type="full outer")
    assert joined.num_rows == result.labelled == 40
    assert joined["quality"].null_count == 0
    levels = np.array([int(path.split("-")[1][0]) for path in joined["relpath"].to_pylist()])
    quality = joined["quality"].to_numpy()
    means = [quality[levels == level].mean() for level in range(4)]
    assert means == sorted(means, reverse=True)


def test_bins_are_filled_evenly_and_the_flag_follows_the_threshold(corpus: Corpus) -> None:
    result = _label(corpus, hq_threshold="q0.7")
    table = _table(corpus)
    quality = table["quality"].to_numpy()
    assert sum(result.histogram) == 40
    assert min(result.histogram) >= 2
    assert max(result.histogram) <= 6
    assert result.hq_plus == 12
    np.testing.assert_array_equal(table["hq_plus"].to_numpy(), quality > result.hq_threshold)
    np.testing.assert_array_equal(table["quality_bin"].to_numpy(), np.floor(quality.astype(float) * 10))
    assert quality.min() >= 0
    assert quality.max() < 1


def test_without_consensus_map_quality_is_the_mean_of_the_papers_minmax(corpus: Corpus) -> None:
    _label(corpus, calibration="minmax", consensus=False, hq_threshold=0.75)
    table = _table(corpus)
    wanted = []
    for metric in METRICS:
        raw = table[f"iqa_{metric}"].to_numpy().astype(np.float64)
        wanted.append((raw - raw.min()) / (raw.max() - raw.min() + 1e-6))
    np.testing.assert_allclose(table["quality"].to_numpy(), np.mean(wanted, axis=0), atol=1e-5)
    np.testing.assert_allclose(table["quality_std"].to_numpy(), np.std(wanted, axis=0), atol=1e-5)
    assert read_label_index(corpus, "default")["hq_threshold"] == 0.75


def test_labelling_again_changes_nothing(corpus: Corpus) -> None:
    first = _label(corpus)
    before = {entry.path: entry.etag for entry in corpus.storage.list()}
    assert _label(corpus) == first
    after = {entry.path: entry.etag for entry in corpus.storage.list()}
    assert set(after) == set(before)


def test_other_settings_need_another_name(corpus: Corpus) -> None:
    _label(corpus)
    for changes, said in (
        ({"bins": 5}, "bins 10, not 5"),
        ({"calibration": "minmax"}, "calibration 'ecdf', not 'minmax'"),
        ({"consensus": False}, "consensus True, not False"),
        ({"knots": 9}, "knots 65, not 9"),
        ({"hq_threshold": "q0.5"}, "hq_threshold 'q0.7', not 'q0.5'"),
        ({"reuse": "default", "metrics": ["rank"]}, "metrics"),
    ):
        with pytest.raises(UsageError, match=f"labels called default with {said}"):
            _label(corpus, **changes)
    _label(corpus, name="second", reuse="default")
    with pytest.raises(UsageError, match="reuse 'default', not ''"):
        _label(corpus, name="second")


def _grow(corpus: Corpus, folder: Path, numbers: range) -> Corpus:
    """The corpus with more pictures of its folder, sharded and scored."""
    for number in numbers:
        Image.fromarray(drawn_picture(number, 32)).save(folder / "pictures" / f"{number}-0.png")
    shard(ShardConfig(input=str(folder / "pictures"), corpus=corpus.storage.url, unit_samples=6, workers=0))
    score(ScoreConfig(corpus=corpus.storage.url, metrics=METRICS, scheduling=ALONE))
    return Corpus(corpus.storage.url)


def test_a_grown_corpus_gets_the_next_version_by_the_frozen_calibration(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=3, side=32, unit_samples=6)
    score(ScoreConfig(corpus=corpus.storage.url, metrics=METRICS, scheduling=ALONE))
    first = _label(corpus)
    view = CurateConfig(corpus=corpus.storage.url, name="all")
    assert curate(view).view == "all@v0001"
    former, files = _table(corpus), {entry.path: entry.etag for entry in corpus.storage.list()}

    corpus = _grow(corpus, tmp_path, range(90, 95))
    grown = _label(corpus)
    assert (first.version, grown.version, grown.labelled) == (1, 2, 17)
    assert (grown.calibration_digest, grown.hq_threshold) == (first.calibration_digest, first.hq_threshold)
    table = _table(corpus)
    old = table.filter(pc.is_in(table["key"], value_set=former["key"].combine_chunks()))
    assert old.sort_by("key").equals(former.sort_by("key"))
    now = {entry.path: entry.etag for entry in corpus.storage.list()}
    assert {path for path in files if now.get(path) != files[path]} <= {"_SUCCESS", "shards.txt"}

    second = curate(view)
    assert (second.view, second.samples) == ("all@v0002", 17)
    assert read_view(corpus, "all@v0002").facts["labels_version"] == 2
    assert read_view(corpus, "all@v0001").table.num_rows == 12
    verify(VerifyConfig(corpus=corpus.storage.url, workers=0))
    before = {entry.path for entry in corpus.storage.list()}
    assert _label(corpus) == grown and {entry.path for entry in corpus.storage.list()} == before
    with pytest.raises(UsageError, match="bins 10, not 5"):
        _label(corpus, bins=5)

    assert _label(_grow(corpus, tmp_path, range(95, 96))).version == 3
    Path(corpus.storage.url, labels_index_path("default", 2)).unlink()
    with pytest.raises(VerificationError, match=r"_labels-0002\.json: is missing"):
        verify(VerifyConfig(corpus=corpus.storage.url, workers=0))


def test_a_reused_calibration_keeps_the_scale(corpus: Corpus) -> None:
    _label(corpus)
    result = _label(corpus, name="second", reuse="default", hq_threshold=0.5)
    assert result.calibration == "default"
    assert _table(corpus)["quality"].equals(_table(corpus, "second")["quality"])
    with pytest.raises(UsageError, match="same metrics"):
        _label(corpus, name="third", reuse="default", metrics=["rank"])


def test_a_failed_score_leaves_the_label_empty_and_is_counted(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=2, side=32)
    score(ScoreConfig(corpus=corpus.storage.url, metrics=METRICS, scheduling=ALONE))
    index = {"rank": corpus.storage.list("_commits/score-rank")}
    _replace_first_score(corpus, index["rank"][0].path)
    result = _label(corpus)
    table = _table(corpus)
    assert (result.labelled, result.unlabelled) == (7, 1)
    row = next(row for row in table.to_pylist() if row["iqa_rank_status"] != "success")
    assert row["iqa_rank"] is row["iqa_rank_cal"] is row["quality"] is row["quality_bin"] is row["hq_plus"] is None
    assert row["iqa_rank_judge"] is not None


def _replace_first_score(corpus: Corpus, record_path: str) -> None:
    """Rewrite a unit's table and record as if rank had failed on its first sample."""
    record = json.loads(corpus.storage.read(record_path))
    table = from_parquet(corpus.storage.read(record["objects"][0]["path"]))
    rows = table.to_pylist()
    rows[0] |= {"raw": None, "status": "failed_metric", "error_code": "RuntimeError"}
    reference = corpus.publish_table(
        pa.Table.from_pylist(rows, table.schema),
        lambda sha: scores_path("rank", record["fingerprint"], 0, sha),
    )
    (Path(corpus.storage.url) / record_path).unlink()
    corpus.storage.create(record_path, json.dumps({**record, "objects": [reference.to_dict()]}).encode())


def test_units_without_scores_and_damaged_scores_are_errors(corpus: Corpus) -> None:
    with pytest.raises(UsageError, match=r"jobs/score\.py"):
        _label(corpus, metrics=["musiq"])
    records = corpus.storage.list("_commits/score-rank")
    corpus.storage.remove(records[0].path)
    with pytest.raises(IncompleteError, match="1 of 3 units"):
        _label(corpus)
    score(ScoreConfig(corpus=corpus.storage.url, metrics=METRICS, scheduling=ALONE))
    path = next(e.path for e in corpus.storage.list("scores/rank_judge") if e.path.endswith(".parquet"))
    file = Path(corpus.storage.url) / path
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(VerificationError):
        _label(corpus)


def test_the_calibration_says_what_it_was_fitted_on(corpus: Corpus) -> None:
    result = _label(corpus)
    calibration = read_calibration(corpus, result.calibration)
    assert calibration.reference == {"manifest": corpus.manifest().digest, "samples": 40, "knots": 65}
    assert calibration.digest == result.calibration_digest
    assert set(calibration.fingerprints) == set(METRICS)


@pytest.mark.parametrize("threshold", ["q1.5", "high", "1.2", -0.1])
def test_a_threshold_that_is_no_quality_is_refused(threshold: str | float) -> None:
    with pytest.raises(UsageError, match="hq_threshold"):
        LabelConfig(corpus="x", hq_threshold=threshold)
