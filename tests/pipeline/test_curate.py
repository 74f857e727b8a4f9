"""Views: chosen by SQL, split by source picture, versioned by content, and honest about errors."""

import dataclasses
import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from iqpir.errors import UsageError
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.curate import CurateConfig, CurateCounts, CurateResult, count, curate, curate_or_count, held_back
from pipeline.dedup import DedupConfig, dedup
from pipeline.label import LabelConfig, label
from pipeline.layout import SAMPLE_REFERENCE, SAMPLES
from pipeline.score import ScoreConfig, score
from pipeline.shard import ShardConfig, shard
from pipeline.sharding.crops import CropPolicy
from pipeline.verify import VerifyConfig, verify
from pipeline.view import read_view
from tests.pipeline.drawn_corpus import drawn_corpus, drawn_picture

ALONE = SchedulingConfig(workers=0)


def _labelled(corpus: Corpus) -> Corpus:
    score(ScoreConfig(corpus=corpus.storage.url, metrics=["rank"], scheduling=ALONE))
    label(LabelConfig(corpus=corpus.storage.url, metrics=["rank"]))
    return corpus


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curate")
    _labelled(drawn_corpus(folder, count=6, side=32, unit_samples=10))
    return folder / "corpus"


@pytest.fixture
def corpus(labelled: Path, tmp_path: Path) -> Corpus:
    """A copy that a test may change."""
    shutil.copytree(labelled, tmp_path / "corpus")
    return Corpus(str(tmp_path / "corpus"))


def _curate(corpus: Corpus, **settings: object) -> CurateResult:
    return curate(CurateConfig(corpus=corpus.storage.url, **{"name": "best", **settings}))  # type: ignore[arg-type]


def test_a_view_holds_what_meets_the_condition_and_nothing_else(corpus: Corpus) -> None:
    result = _curate(corpus, where="quality > 0.5 and width >= 32 and iqa_rank > 0")
    view = read_view(corpus, result.view)
    assert 0 < view.table.num_rows == result.samples < 24
    assert pc.min(view.table["quality"]).as_py() > 0.5
    wanted = [*SAMPLE_REFERENCE.names, "collection", "relpath", "iqa_rank", "iqa_rank_cal", "iqa_rank_status"]
    wanted += ["quality", "quality_std", "quality_bin", "hq_plus", "split"]
    assert view.table.column_names == wanted
    assert result.train + result.val == result.samples
    assert view.facts["where"] == "quality > 0.5 and width >= 32 and iqa_rank > 0"
    assert corpus.read_sample(view.table.to_pylist()[0]).startswith(b"\x89PNG")
    verify(VerifyConfig(corpus=corpus.storage.url))


def test_the_same_choice_is_the_same_version_and_another_the_next(corpus: Corpus) -> None:
    first = _curate(corpus, where="quality > 0.5")
    files = [entry.path for entry in corpus.storage.list("views")]
    again = _curate(corpus, where="quality > 0.5")
    assert (first.view, first.new, again.view, again.new) == ("best@v0001", True, "best@v0001", False)
    assert [entry.path for entry in corpus.storage.list("views")] == files
    assert _curate(corpus, where="quality > 0.2").view == "best@v0002"
    assert _curate(corpus, where="quality > 0.5").view == "best@v0001"
    assert read_view(corpus, "best").reference == "best@v0002"


def test_crops_of_one_picture_never_lie_on_both_sides(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(5):
        Image.fromarray(drawn_picture(number, 96)).save(source / f"{number}.png")
    url = str(tmp_path / "corpus")
    shard(ShardConfig(input=str(source), corpus=url, crop=CropPolicy(size=32), workers=0))
    corpus = _labelled(Corpus(url))
    view = read_view(corpus, _curate(corpus, holdout=0.3).view)
    relpath = dict(zip(*(corpus.samples(["key", "relpath"])[c].to_pylist() for c in ("key", "relpath")), strict=True))
    sides: dict[str, set[str]] = {}
    for row in view.table.to_pylist():
        sides.setdefault(relpath[row["key"]], set()).add(row["split"])
    assert view.table.num_rows > 5
    assert all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {"train", "val"}


def test_each_side_has_a_source_and_a_grown_corpus_keeps_its_split() -> None:
    def held(count: int, holdout: float, seed: int) -> set[str]:
        names = pa.array([f"images/{number:03d}.png" for number in range(count)], pa.string())
        return set(names.filter(pa.array(held_back(names, holdout, seed))).to_pylist())

    few = {f"images/{number:03d}.png" for number in range(40)}
    assert held(40, 0.2, 0) == held(200, 0.2, 0) & few
    assert 0.1 < len(held(200, 0.2, 0)) / 200 < 0.3
    assert held(40, 0.2, 0) != held(40, 0.2, 1)
    assert len(held(2, 0.0001, 0)) == 1
    assert len(held(2, 0.9999, 0)) == 1
    assert held(1, 0.5, 0) == set()
    assert held(40, 0.0, 0) == set()


@pytest.mark.parametrize(
    "where",
    [
        "qualty > 0.5",
        "quality >",
        "1 = 1) OR (quality > ",
        "true); DROP TABLE candidates; SELECT (1",
        "key IN (SELECT content FROM read_text('/etc/hostname'))",
    ],
)
def test_a_bad_condition_is_an_error_with_the_columns_and_writes_nothing(corpus: Corpus, where: str) -> None:
    with pytest.raises(UsageError, match=r"Columns: key, .*quality"):
        _curate(corpus, where=where)
    assert corpus.storage.list("views") == []


@pytest.mark.parametrize(
    "where",
    [
        " and ".join(f'("{name.upper()}" is null or true)' for name in SAMPLES.names),
        "COLUMNS('^u[rn]i') is not null",
        "key in (select key from candidates where status = 'success')",
    ],
)
def test_a_condition_may_use_every_column_though_only_what_it_names_is_read(corpus: Corpus, where: str) -> None:
    assert _curate(corpus, where=where).samples == corpus.manifest().samples


def test_a_row_says_which_file_it_was(corpus: Corpus) -> None:
    rows = read_view(corpus, _curate(corpus).view).table.to_pylist()
    samples = {row["key"]: row for row in corpus.samples(["key", "collection", "relpath"]).to_pylist()}
    assert rows and all({name: row[name] for name in samples[row["key"]]} == samples[row["key"]] for row in rows)


def test_an_empty_choice_is_an_error(corpus: Corpus) -> None:
    with pytest.raises(UsageError, match="No sample meets"):
        _curate(corpus, where="quality > 2")


def test_missing_labels_name_the_known_ones(corpus: Corpus) -> None:
    with pytest.raises(UsageError, match="Known: default"):
        _curate(corpus, labels="defualt")


def test_the_view_states_its_parents(corpus: Corpus) -> None:
    facts = read_view(corpus, _curate(corpus).view).facts
    assert facts["manifest"] == corpus.manifest().digest
    assert facts["calibration_name"] == "default"
    assert len(facts["calibration"]) == 12
    assert 0 < facts["hq_threshold"] < 1


def test_a_dry_run_counts_what_becomes_of_every_input_and_writes_nothing(
    corpus: Corpus,
) -> None:
    folder = Path(corpus.storage.url)
    pictures = folder.parent / "more"
    pictures.mkdir()
    Image.fromarray(drawn_picture(70, 32)).save(pictures / "whole.png")
    (pictures / "cut.png").write_bytes((pictures / "whole.png").read_bytes()[:60])
    shard(ShardConfig(input=str(pictures), corpus=str(folder), collection="more", unit_samples=10, workers=0))
    _labelled(Corpus(str(folder)))
    config = CurateConfig(corpus=str(folder), name="best", where="quality > 0.5", holdout=0.3)
    before = {entry.path for entry in corpus.storage.list()}
    counts = curate_or_count(dataclasses.replace(config, dry_run=True))
    assert isinstance(counts, CurateCounts)
    assert {entry.path for entry in corpus.storage.list()} == before
    assert sum(counts.inputs.values()) == 26 and counts.inputs["success"] == 25 and len(counts.inputs) == 2
    assert counts.samples + counts.unmet + counts.duplicates + counts.unlabelled == 25
    assert counts.mean_quality is not None and counts.mean_quality > 0.5
    made = curate_or_count(config)
    assert isinstance(made, CurateResult)
    assert (made.samples, made.train, made.val) == (counts.samples, counts.train, counts.val)
    nothing = count(dataclasses.replace(config, where="quality > 2"))
    assert (nothing.samples, nothing.unmet, nothing.mean_quality) == (0, 25, None)


def test_duplicates_that_are_not_regarded_are_named(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _curate(corpus)
    assert "not regarded" not in caplog.text
    dedup(DedupConfig(corpus=corpus.storage.url, name="copies", keep="first", scheduling=ALONE))
    _curate(corpus, where="quality > 0.1")
    assert "the duplicates that were found are not regarded; --dedup copies does" in caplog.text
    caplog.clear()
    _curate(corpus, where="quality > 0.1", dedup="copies")
    assert "not regarded" not in caplog.text
