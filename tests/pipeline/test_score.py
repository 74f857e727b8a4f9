"""Every sample gets a row from every metric, each metric commits alone, and labels are reproducible."""

import dataclasses
import io
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from iqpir.errors import PermanentError, UsageError, VerificationError
from iqpir.pixels import PixelPolicy
from pipeline.command import parse
from pipeline.commits.units import LostWorkerError, SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.gc import GcConfig, gc
from pipeline.label import LabelConfig, label
from pipeline.layout import SCORES
from pipeline.metrics import find_metrics
from pipeline.score import ScoreConfig, ScoringConfig, _require_device, _warn_of_licences, score
from pipeline.scoring.batches import LoadedMetric, score_batch
from pipeline.scoring.passes import Scoring, score_samples
from pipeline.scoring.tables import read_scores
from pipeline.scoring.tiling import Picture
from pipeline.shard import ShardConfig, shard
from pipeline.status import StatusConfig, status
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify
from tests.chaos.invariants import files
from tests.pipeline.drawn_corpus import drawn_corpus, drawn_picture
from tests.pipeline.metric_plugin import install_moody, set_mood

ALONE = SchedulingConfig(workers=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return drawn_corpus(tmp_path_factory.mktemp("scored"))


def _scores(corpus: Corpus, metric: str) -> pa.Table:
    paths = [e.path for e in corpus.storage.list(f"scores/{metric}") if e.path.endswith(".parquet")]
    return pa.concat_tables([pq.read_table(io.BytesIO(corpus.storage.read(path))) for path in paths])


def _loaded(scorer: Callable[[Tensor], Tensor], batchable: bool = True) -> LoadedMetric:
    metric = dataclasses.replace(find_metrics(["rank"])[0], batchable=batchable)
    return LoadedMetric(metric, scorer, "cpu")


def _records(corpus: Corpus, metric: str) -> int:
    return len(corpus.storage.list(f"_commits/score-{metric}"))


def _how(batch_pixels: int = 1 << 20) -> Scoring:
    return Scoring(pixels=PixelPolicy(), batch_pixels=batch_pixels)


def test_each_sample_has_one_row_and_better_pictures_score_higher(corpus: Corpus) -> None:
    result = score(ScoreConfig(corpus=corpus.storage.url, metrics=["rank"], scheduling=ALONE))
    table, samples = _scores(corpus, "rank"), corpus.samples(["key", "relpath", "sha256"])
    assert result.samples == 16
    assert result.metrics["rank"]["scored"] == 16
    assert table.schema.equals(SCORES)
    assert sorted(table["key"].to_pylist()) == sorted(samples["key"].to_pylist())
    assert set(table["sample_sha256"].to_pylist()) == set(samples["sha256"].to_pylist())
    raw = dict(zip(table["key"].to_pylist(), table["raw"].to_pylist(), strict=True))
    by_level: dict[str, list[float]] = {}
    for key, relpath in zip(samples["key"].to_pylist(), samples["relpath"].to_pylist(), strict=True):
        by_level.setdefault(relpath.split("-")[1], []).append(raw[key])
    means = [np.mean(by_level[name]) for name in sorted(by_level)]
    assert means == sorted(means, reverse=True)


def test_adding_a_metric_computes_only_that_one(corpus: Corpus) -> None:
    score(ScoreConfig(corpus=corpus.storage.url, metrics=["rank"], scheduling=ALONE))
    before = {entry.path: entry.etag for entry in corpus.storage.list() if "rank_judge" not in entry.path}
    result = score(ScoreConfig(corpus=corpus.storage.url, metrics=["rank", "rank_judge"], scheduling=ALONE))
    assert result.metrics["rank"]["scored"] == 0
    assert result.metrics["rank_judge"]["scored"] == 16
    after = {entry.path: entry.etag for entry in corpus.storage.list() if "rank_judge" not in entry.path}
    assert after == before
    again = score(ScoreConfig(corpus=corpus.storage.url, metrics=["rank", "rank_judge"], scheduling=ALONE))
    assert again.skipped_units == len(corpus.manifest().units)


def test_a_scored_corpus_verifies_and_a_cut_table_of_scores_does_not(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1)
    score(ScoreConfig(corpus=corpus.storage.url, metrics=["rank"], scheduling=ALONE))
    verify(VerifyConfig(corpus=corpus.storage.url))
    path = next(e.path for e in corpus.storage.list("scores/rank") if e.path.endswith(".parquet"))
    file = Path(corpus.storage.url) / path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(VerificationError):
        verify(VerifyConfig(corpus=corpus.storage.url))


def test_another_pixel_policy_is_another_edition(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1)
    editions = {
        score(
            ScoreConfig(
                corpus=corpus.storage.url,
                metrics=["rank"],
                pixels=PixelPolicy(background=b),
                scheduling=ALONE,
            )
        ).metrics["rank"]["fingerprint"]
        for b in ((255, 255, 255), (0, 0, 0))
    }
    assert len(editions) == 2


def test_a_sample_that_the_policy_refuses_is_a_row_with_its_reason(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1)
    config = ScoreConfig(
        corpus=corpus.storage.url, metrics=["rank"], pixels=PixelPolicy(max_pixels=100), scheduling=ALONE
    )
    found = score(config).metrics["rank"]
    assert (found["scored"], found["failed"]) == (0, 4)
    table = _scores(corpus, "rank")
    assert table["raw"].null_count == 4
    assert set(table["status"].to_pylist()) == {"failed_decode"}
    assert set(table["error_code"].to_pylist()) == {"too_many_pixels"}


def test_missing_weights_and_unknown_metrics_stop_before_any_work(corpus: Corpus) -> None:
    before = {entry.path for entry in corpus.storage.list()}
    with pytest.raises(UsageError, match="rank"):
        score(ScoreConfig(corpus=corpus.storage.url, metrics=["rnk"], scheduling=ALONE))
    assert {entry.path for entry in corpus.storage.list()} == before


def test_out_of_memory_halves_the_batch_and_then_fails_one_sample() -> None:
    sizes: list[int] = []

    def hungry(pictures: Tensor) -> Tensor:
        sizes.append(len(pictures))
        if len(pictures) > 2 or bool((pictures == 0).all((1, 2, 3)).any()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pictures.mean((1, 2, 3))

    pictures: list[Picture] = [np.full((8, 8, 3), value, np.uint8) for value in (0, 51, 102, 153, 204)]
    found = score_batch(_loaded(hungry), pictures)
    assert sizes[0] == 5
    assert found[0].status == "failed_out_of_memory"
    assert [scored.raw for scored in found[1:]] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("words", ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_the_tensors_of_a_batch_that_did_not_fit_are_gone_before_its_halves_run(words: str) -> None:
    seen: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def hungry(pictures: Tensor) -> Tensor:
        held.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(pictures))
        raise RuntimeError(words)

    pictures: list[Picture] = [np.full((8, 8, 3), 51, np.uint8)] * 4
    assert {scored.status for scored in score_batch(_loaded(hungry), pictures)} == {"failed_out_of_memory"}
    assert held == [0] * 7


def test_a_device_that_computes_no_more_is_no_fault_of_the_picture() -> None:
    loaded = dataclasses.replace(_loaded(lambda x: x.mean((1, 2, 3))), device="cuda:99")
    with pytest.raises(LostWorkerError, match=r"rank lost the device cuda:99"):
        score_batch(loaded, [np.zeros((8, 8, 3), np.uint8)])


def test_a_broken_metric_fails_its_units_and_the_others_are_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_moody(tmp_path / "plugin", monkeypatch)
    corpus = drawn_corpus(tmp_path, count=2, side=32)
    names, cascade = ["rank", "moody", "rank_judge"], {"rank_judge": "moody > -1"}
    config = ScoreConfig(corpus=corpus.storage.url, metrics=names, cascade=cascade, scheduling=ALONE)
    set_mood(tmp_path / "plugin", "TypeError")
    with pytest.raises(PermanentError, match=r"2 of 2 units .*moody is broken: TypeError: as its mood says"):
        score(config)
    units = len(corpus.manifest().units)
    assert [_records(corpus, name) for name in names] == [units, 0, 0]
    set_mood(tmp_path / "plugin", "")
    found = score(config).metrics
    assert [found[name]["scored"] for name in names] == [0, 8, 8]


def test_a_metric_that_fails_on_most_samples_of_a_unit_is_not_committed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_moody(tmp_path / "plugin", monkeypatch)
    corpus = drawn_corpus(tmp_path, count=2, side=32)
    config = ScoreConfig(corpus=corpus.storage.url, metrics=["rank", "moody"], scheduling=ALONE)
    set_mood(tmp_path / "plugin", "RuntimeError")
    with pytest.raises(PermanentError, match=r"failed on 6 of 6 .* failed_metric RuntimeError.*--max_failed"):
        score(config)
    assert (_records(corpus, "rank"), _records(corpus, "moody")) == (2, 0)
    accepting = score(dataclasses.replace(config, max_failed=1.0)).metrics["moody"]
    assert (accepting["scored"], accepting["failed"]) == (0, 8)


@pytest.mark.parametrize("conditional", [True, False], ids=["conditions", "no conditions"])
def test_a_retry_scores_what_failed_and_what_waited_for_it_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    plugin = tmp_path / "plugin"
    install_moody(plugin, monkeypatch)
    corpus = drawn_corpus(tmp_path, count=2, side=32)
    monkeypatch.setattr(Storage, "conditional", conditional)
    config = ScoreConfig(
        corpus=corpus.storage.url,
        metrics=["moody", "rank"],
        cascade={"rank": "moody > -1"},
        max_failed=1.0,
        scheduling=ALONE,
    )
    set_mood(plugin, "RuntimeError 0.5")
    first = score(config).metrics
    failed = first["moody"]["failed"]
    assert 0 < failed < 8 and first["rank"]["skipped"] == failed
    labels = LabelConfig(corpus=corpus.storage.url, metrics=config.metrics)
    assert (found := label(labels)).version == 1 and found.unlabelled == failed
    before = files(corpus.storage)

    retrying = dataclasses.replace(config, retry=True)
    assert score(retrying).metrics["moody"]["failed"] == failed
    assert files(corpus.storage) == before

    set_mood(plugin, "")
    again = score(retrying).metrics
    assert (again["moody"]["scored"], again["rank"]["scored"]) == (failed, failed)
    assert {path: data for path, data in files(corpus.storage).items() if path in before} == before
    facts = {name: {"fingerprint": found["fingerprint"]} for name, found in again.items()}
    for unit in read_scores(corpus, facts):
        for name in config.metrics:
            assert set(unit.statuses[name].to_pylist()) == {"success"} and np.isfinite(unit.raw[name]).all()
    assert (found := label(labels)).version == 2 and found.unlabelled == 0
    verify(VerifyConfig(corpus=corpus.storage.url, workers=0))
    assert gc(GcConfig(corpus=corpus.storage.url, grace_hours=0.0)).orphans == 0
    steps = status(StatusConfig(corpus=corpus.storage.url)).steps
    assert set(steps.values()) == {len(corpus.manifest().units)}
    now = files(corpus.storage)
    assert sum(found["scored"] for found in score(retrying).metrics.values()) == 0
    assert files(corpus.storage) == now


def test_a_score_that_is_not_finite_or_raises_fails_only_its_sample() -> None:
    def fragile(pictures: Tensor) -> Tensor:
        means = pictures.mean((1, 2, 3))
        if bool((means == 1).any()):
            raise RuntimeError("the algorithm failed to converge")
        return torch.where(means == 0, torch.nan, means)

    pictures: list[Picture] = [np.full((8, 8, 3), value, np.uint8) for value in (0, 51, 255)]
    found = score_batch(_loaded(fragile), pictures)
    assert [scored.status for scored in found] == ["failed_bad_score", "success", "failed_metric"]
    assert [scored.raw for scored in found] == [None, pytest.approx(0.2), None]


def test_metrics_whose_score_depends_on_the_batch_see_one_picture_at_a_time() -> None:
    def relative(pictures: Tensor) -> Tensor:
        return pictures.mean((1, 2, 3)) - pictures.mean()

    pictures: list[Picture] = [np.full((8, 8, 3), value, np.uint8) for value in (0, 255)]
    assert [scored.raw for scored in score_batch(_loaded(relative, batchable=False), pictures)] == [0.0, 0.0]


def test_batches_hold_equal_sizes_and_bounded_pixels(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    corpus = drawn_corpus(source, count=3, unit_samples=100)
    shapes: list[tuple[int, ...]] = []

    def watching(pictures: Tensor) -> Tensor:
        shapes.append(tuple(pictures.shape))
        return pictures.mean((1, 2, 3))

    rows = corpus.samples().to_pylist()
    found = score_samples(corpus, rows, [_loaded(watching)], _how(5 * 48 * 48)).results
    assert len(found["rank"]) == 12
    assert max(shape[0] for shape in shapes) == 5
    assert len(shapes) == 3


def test_changed_bytes_in_a_shard_are_never_scored(tmp_path: Path) -> None:
    corpus = drawn_corpus(tmp_path, count=1)
    row = corpus.samples().to_pylist()[0]
    file = Path(corpus.storage.url) / row["shard"]
    data = bytearray(file.read_bytes())
    data[row["byte_offset"] + 40] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError):
        score_samples(corpus, [row], [_loaded(lambda x: x.mean((1, 2, 3)))], _how())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["piqe", "niqe", "rank"])
def test_a_score_is_the_same_alone_and_in_any_batch(name: str) -> None:
    scorer = find_metrics([name])[0].scorer("cpu")
    pictures = torch.stack(
        [torch.from_numpy(drawn_picture(seed, 112)).permute(2, 0, 1).float() / 255 for seed in range(10)]
    )
    with torch.inference_mode():
        alone = torch.cat([scorer(picture[None]) for picture in pictures])
        for size in (2, 5, 10):
            together = torch.cat([scorer(batch) for batch in pictures.split(size)])
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_workers_on_ray_and_this_process_give_the_same_scores(tmp_path: Path, local_ray: None) -> None:
    tables = []
    for name, flag in (("here", "--scheduling.workers=0"), ("ray", "--scoring.actors=1..2")):
        corpus = drawn_corpus(tmp_path / name, count=2, unit_samples=4)
        flags = ["--corpus", corpus.storage.url, "--metrics=[rank]"]
        score(parse(ScoreConfig, [*flags, flag], "score"))
        tables.append(_scores(corpus, "rank").drop_columns(["seconds"]).sort_by("key"))
    assert tables[0]["key"].equals(tables[1]["key"])
    np.testing.assert_allclose(tables[0]["raw"].to_numpy(), tables[1]["raw"].to_numpy(), atol=1e-5)
    shared = [*flags, "--tiling.size=40", "--scoring.actors=1..2", "--scheduling.gpus=0.25"]
    with pytest.raises(UsageError, match=r"No node has 1 CPUs and 0\.25 GPUs for one worker"):
        score(parse(ScoreConfig, shared, "score"))


@pytest.mark.parametrize(("said", "pool"), [("4", (4, 4)), (4, (4, 4)), ("1..4", (1, 4)), ("", (0, 1))])
def test_how_many_actors_there_are_is_a_number_or_a_range(said: int | str, pool: tuple[int, int]) -> None:
    scheduling, actors = ScoreConfig(corpus="c", scoring=ScoringConfig(actors=said)).pool()
    assert (actors.least, scheduling.workers) == pool


@pytest.mark.parametrize("said", ["0", "4..1", "1..", "many", -1])
def test_a_range_of_actors_without_sense_is_refused(said: int | str) -> None:
    with pytest.raises(UsageError, match=r"scoring\.actors"):
        ScoringConfig(actors=said)
    with pytest.raises(UsageError, match="say the same"):
        ScoreConfig(corpus="c", scoring=ScoringConfig(actors=2), scheduling=SchedulingConfig(workers=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has what the test lacks")
def test_a_cuda_device_is_asked_for_where_the_metrics_run(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ScoreConfig(corpus=corpus.storage.url, metrics=["rank"], device="cuda", scheduling=ALONE)
    with pytest.raises(UsageError, match="no CUDA device on this machine"):
        score(here)
    monkeypatch.setenv("RAY_ADDRESS", "nobody-is-asked:1")
    there = dataclasses.replace(here, scheduling=SchedulingConfig(workers=1))
    with pytest.raises(UsageError, match=r"need scheduling\.gpus"):
        score(there)
    _require_device(dataclasses.replace(there, scheduling=SchedulingConfig(workers=1, gpus=0.25)))
    with pytest.raises(UsageError, match="neither cpu nor cuda"):
        dataclasses.replace(here, device="gpu")


def test_scores_that_may_not_be_used_commercially_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_licences(["rank", "piqe", "niqe"])
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("piqe, niqe: pyiqa: PolyForm-Noncommercial") and "--commercial-safe" in said


def test_pictures_of_many_sizes_share_a_pass(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, side in enumerate((32, 40, 32, 64, 40)):
        Image.fromarray(drawn_picture(number, side)).save(folder / f"{number}.png")
    shard(ShardConfig(input=str(folder), corpus=str(tmp_path / "corpus"), workers=0))
    result = score(ScoreConfig(corpus=str(tmp_path / "corpus"), metrics=["rank"], scheduling=ALONE))
    assert result.metrics["rank"]["scored"] == 5
