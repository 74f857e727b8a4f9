"""A training is a run: stopped, resumed, finished once, refused where it would be another, and tracked as one."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import decode
from iqpir.stages.stage3 import Stage3Config
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.encode import EncodeConfig, encode
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.restore import RECORD, RestoreConfig, restore
from pipeline.stage1 import prepare, train_stage1
from pipeline.stage2 import train_stage2
from pipeline.stage3 import Stage3Training, train_stage3
from pipeline.stage3 import prepare as prepare_stage3
from pipeline.storage import Storage
from pipeline.tracking.runs import AwayError
from pipeline.training.config import Training, TrainResult
from pipeline.training.driver import TRACKED, tracked_run
from pipeline.training.launch import Workers
from pipeline.training.prior import PriorConfig, build_prior
from pipeline.view import read_view
from tests.chain import Chain, label_and_curate
from tests.pipeline.training_job import Job

STEPS = 24


@pytest.fixture(scope="session")
def stage2(chain: Chain) -> TrainResult:
    """A finished stage 2 on the shared stage 1; it keeps its checkpoints of steps 2 and 4."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("IQPIR_WORKSPACE", str(chain.folder))
        return train_stage2(chain.data.stage2("stage2", chain.stage1.run))


def metadata(result: TrainResult | dict[str, Any]) -> dict[str, Any]:
    checkpoint = result["checkpoint"] if isinstance(result, dict) else result.checkpoint
    found: dict[str, Any] = json.loads((Path(checkpoint) / "config.json").read_text())["metadata"]
    return found


def mlflow_run(training: Training, run_id: str) -> Run:
    return MlflowClient(training.tracking_uri).get_run(run_id)


def steps_of(training: Training, run_id: str, key: str = "loss") -> list[int]:
    history = MlflowClient(training.tracking_uri).get_metric_history(run_id, key)
    return sorted(point.step for point in history)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_stopped_training_goes_on_to_the_weights_of_one_that_was_not(
    number: int, chain: Chain, tmp_path: Path
) -> None:
    def settings(name: str) -> Training:
        changes = {"steps": STEPS, "checkpoint_every": 4}
        if number == 1:
            return chain.data.stage1(name, **changes)
        return chain.data.stage2(name, chain.stage1.run, **changes)

    broken = settings(f"broken{number}")
    job = Job(broken, tmp_path)
    process = job.start()
    job.wait_for_checkpoint(process)
    process.send_signal(signal.SIGTERM)
    stopped = job.finish(process, 3)
    assert stopped["status"] == "stopped" and 4 <= stopped["step"] < STEPS
    assert mlflow_run(broken, stopped["mlflow_run"]).info.status == "KILLED"
    assert metadata(stopped)["samples_seen"] == 4 * stopped["step"]

    resumed = job.finish(job.start(), 0)
    assert (resumed["status"], resumed["step"]) == ("done", STEPS)
    assert resumed["resumed_from"] == stopped["step"]
    assert resumed["mlflow_run"] == stopped["mlflow_run"] != ""

    whole = settings(f"whole{number}")
    straight = (train_stage1 if number == 1 else train_stage2)(whole)  # type: ignore[operator]
    assert straight.resumed_from == 0
    for digest in ("weights_digest", "stage1_digest", "samples_seen"):
        assert metadata(resumed)[digest] == metadata(straight)[digest]
    logged = steps_of(whole, straight.mlflow_run)
    assert logged == list(range(2, STEPS + 1, 2))
    # The stop reports once more, at whatever step it came.
    assert set(steps_of(broken, resumed["mlflow_run"])) == {*logged, stopped["step"]}
    assert mlflow_run(broken, resumed["mlflow_run"]).info.status == "FINISHED"


def test_a_finished_run_is_not_done_again(chain: Chain) -> None:
    settings = chain.data.stage1("stage1")
    before = {path: path.stat().st_mtime_ns for path in Path(settings.run_url).rglob("*")}
    ended = mlflow_run(settings, chain.stage1.mlflow_run).info.end_time
    again = train_stage1(settings)
    assert again.status == "done earlier" and again.exit_code == 0
    assert dataclasses.replace(again, status="done", seconds=chain.stage1.seconds) == chain.stage1
    assert {path: path.stat().st_mtime_ns for path in Path(settings.run_url).rglob("*")} == before
    assert mlflow_run(settings, chain.stage1.mlflow_run).info.end_time == ended


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, r"training\.seed \(2603 there, 7 here\)"),
        ({"network": {"heads": 2}}, r"no field 'heads'\. Known: .*transformer_heads"),
        ({"network": {"transformer_heads": 2}}, r"network\.transformer_heads \(4 there, 2 here\)"),
        ({"steps": 13, "batch_size": 8}, r"training\.batch_size.*training\.steps"),
    ],
)
def test_another_configuration_under_the_same_name_is_refused(
    chain: Chain, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train_stage1(chain.data.stage1("stage1", **changes))


@pytest.mark.parametrize(
    ("batch", "least", "most", "message"),
    [
        (4, 0, 3, "4 cannot be shared evenly by 3 workers"),
        (16, 2, 4, r"16 cannot be shared evenly by 3 workers.*multiple of 12, or .* of \[1, 2, 4, 8, 16\]"),
        (0, 0, 1, "0 cannot be shared"),
    ],
)
def test_a_batch_that_some_number_of_workers_cannot_share_is_refused_at_once(
    batch: int, least: int, most: int, message: str, chain: Chain
) -> None:
    with pytest.raises(UsageError, match=message):
        chain.data.stage1("uneven", batch_size=batch, workers=Workers(count=most, min_count=least))
    assert chain.data.stage1("even", batch_size=12, workers=Workers(count=4, min_count=2)).batch_size == 12


def test_how_often_it_logs_may_change(chain: Chain) -> None:
    assert train_stage1(chain.data.stage1("stage1", log_every=3, keep=5)).status == "done earlier"


def test_a_damaged_newest_checkpoint_is_passed_over(chain: Chain, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(Path(chain.data.runs) / "stage1", runs / "stage1")
    weights = runs / "stage1/checkpoints/step_00000012-a1/network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (runs / "stage1/result.json").unlink()
    again = train_stage1(chain.data.stage1("stage1", runs=str(runs)))
    assert (again.status, again.resumed_from) == ("done", 6)
    assert again.checkpoint.endswith("step_00000012-a2")
    assert metadata(again)["weights_digest"] == metadata(chain.stage1)["weights_digest"]
    assert again.mlflow_run == chain.stage1.mlflow_run


def test_the_view_is_the_training_data_of_the_run(chain: Chain, stage2: TrainResult) -> None:
    digest = read_view(Corpus(chain.data.corpus), chain.data.view).digest
    for training, result in ((chain.data.stage1("stage1"), chain.stage1), (chain.data.stage1("x"), stage2)):
        run = mlflow_run(training, result.mlflow_run)
        (entry,) = run.inputs.dataset_inputs
        assert (entry.dataset.name, entry.dataset.digest) == (chain.data.view, digest)
        assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]
        assert run.data.tags["lineage.view"] == digest == metadata(result)["lineage"]["view"]
        assert run.info.status == "FINISHED"


def test_stage2_is_bound_to_its_stage1_and_codes(chain: Chain, stage2: TrainResult) -> None:
    lineage = metadata(stage2)["lineage"]
    assert lineage["stage1"] == metadata(chain.stage1)["stage1_digest"]
    assert len(lineage["codes"]) == 64 and lineage["prior"] == "rank"


def stage3_settings(chain: Chain, stage2: TrainResult) -> Stage3Training:
    before = chain.data.stage2("stage2", chain.stage1.run)
    common = {field.name: getattr(before, field.name) for field in dataclasses.fields(Training)}
    stage = Stage3Config(trained="fidelity", code_steps=0, fidelity_every=1, quality_weight=0.2, dial_fraction=0.5)
    changes = {"name": "stage3", "steps": 2, "degradation": "tiny32", "perceptual": "ssim", "stage": stage}
    return Stage3Training(**{**common, **changes}, stage2=stage2.run)


def test_stage3_says_which_metrics_the_prior_of_its_stage2_had(chain: Chain, stage2: TrainResult) -> None:
    """Evaluation takes from the lineage which metrics are in the loss."""
    corpus = Corpus(chain.data.corpus)
    view = read_view(corpus, chain.data.view)
    lineage = prepare_stage3(stage3_settings(chain, stage2), corpus, view).lineage
    assert lineage["prior"] == "rank" and lineage["stage2"] == metadata(stage2)["weights_digest"]


@pytest.mark.slow
def test_fidelity_is_evaluated_where_stage_3_has_trained_it(chain: Chain, stage2: TrainResult, tmp_path: Path) -> None:
    stage3 = train_stage3(stage3_settings(chain, stage2))
    settings = EvaluateConfig(
        corpus=chain.data.corpus,
        view=chain.data.view,
        checkpoint=stage3.run,
        output=str(tmp_path / "plain"),
        dial=(0.05, 0.5, 0.95),
        samples=4,
        track=False,
    )
    plain = evaluate(settings)
    assert plain.metrics["rank"]["in_loss"] is True and plain.fidelity == []
    several = evaluate(dataclasses.replace(settings, output=str(tmp_path / "several"), fidelity=(0.0, 1.0)))
    assert [row["fidelity"] for row in several.fidelity] == [0.0, 1.0]
    assert several.psnr == plain.psnr and several.dial == plain.dial and several.digest != plain.digest
    first, second = several.fidelity
    assert first["psnr"] == several.psnr["restored"] != second["psnr"]
    one = evaluate(dataclasses.replace(settings, output=str(tmp_path / "one"), fidelity=(1.0,)))
    assert one.psnr["restored"] == second["psnr"] and one.dial != plain.dial
    with pytest.raises(UsageError, match="needs what stage 3 trains"):
        refused = dataclasses.replace(settings, checkpoint=stage2.run, output=str(tmp_path / "no"), fidelity=(1.0,))
        evaluate(refused)
    with pytest.raises(UsageError, match="one or more values"):
        dataclasses.replace(settings, fidelity=())


def test_codes_of_another_stage1_are_refused(chain: Chain) -> None:
    other = train_stage1(chain.data.stage1("other-weights", steps=2, seed=1))
    settings = chain.data.stage2("wrong-codes", other.run)
    with pytest.raises(UsageError, match=r"jobs/encode\.py"):
        train_stage2(settings)
    assert not Path(settings.run_url).exists()
    assert train_stage2(dataclasses.replace(settings, codes="online", steps=1)).status == "done"


def test_a_stage2_is_no_stage1(chain: Chain, stage2: TrainResult) -> None:
    """Its encoder is for degraded pictures: its codes of good ones are not what they are made of."""
    message = rf"is a checkpoint of stage2, not of stage 1\. Name .*{metadata(chain.stage1)['stage1_digest'][:12]}"
    settings = chain.data.stage2("on-stage2", stage2.run, codes="online")
    with pytest.raises(UsageError, match=message):
        train_stage2(settings)
    assert not Path(settings.run_url).exists()
    with pytest.raises(UsageError, match=message):
        encode(EncodeConfig(corpus=chain.data.corpus, stage1=stage2.run))


def test_a_checkpoint_of_another_calibration_is_refused(chain: Chain, stage2: TrainResult) -> None:
    data = label_and_curate(chain.data.corpus, chain.data.runs, chain.data.tracking_uri, "minmax", calibration="minmax")
    settings = data.stage2("wrong-calibration", chain.stage1.run)
    with pytest.raises(VerificationError, match="calibration"):
        train_stage2(settings)
    assert not Path(settings.run_url).exists()
    with pytest.raises(VerificationError, match="calibration"):
        evaluate(EvaluateConfig(corpus=data.corpus, view=data.view, checkpoint=stage2.run))


def test_a_checkpoint_of_another_threshold_is_refused_unless_the_threshold_is_given(chain: Chain) -> None:
    data = label_and_curate(chain.data.corpus, chain.data.runs, chain.data.tracking_uri, "strict", hq_threshold="q0.9")
    with pytest.raises(VerificationError, match=r"for high, the view strict@v0001 those above"):
        train_stage2(data.stage2("wrong-threshold", chain.stage1.run))
    ours = json.loads((Path(chain.stage1.checkpoint) / "config.json").read_text())["network"]["hq_threshold"]
    given = data.stage2("given-threshold", chain.stage1.run, network={"hq_threshold": ours}, steps=1)
    assert train_stage2(given).status == "done"


def test_the_papers_minmax_steers_what_scores_beyond_the_corpus(chain: Chain) -> None:
    data = label_and_curate(chain.data.corpus, chain.data.runs, chain.data.tracking_uri, "minmax", calibration="minmax")
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    quality = build_prior(Corpus(data.corpus), data.view, PriorConfig(metrics=["rank"]), torch.device("cpu"))(noise)
    (gradient,) = torch.autograd.grad(quality.sum(), noise)
    assert bool((quality < 0).all()) and bool(gradient.flatten(1).any(dim=1).all())


def test_a_loss_that_leaves_no_judge_is_refused(chain: Chain) -> None:
    settings = chain.data.stage2("no-judge", chain.stage1.run, prior=["rank", "rank_judge"])
    with pytest.raises(UsageError, match="rank_judge was in the loss"):
        train_stage2(settings)
    assert not Path(settings.run_url).exists()


def test_stage1_needs_a_checkpoint_and_a_view(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished checkpoint"):
        train_stage2(chain.data.stage2("lost", str(tmp_path / "nothing")))
    with pytest.raises(UsageError, match=r"has no view missing.*default"):
        train_stage1(chain.data.stage1("lost", view="missing"))
    with pytest.raises(UsageError, match="A sample is 32x32, the network wants 64x64"):
        train_stage1(chain.data.stage1("too-large", preset="tiny64"))


BELOW = "tags.mlflow.parentRunId = '{}'"


def test_an_evaluation_is_made_once(chain: Chain, stage2: TrainResult, tmp_path: Path) -> None:
    settings = EvaluateConfig(
        corpus=chain.data.corpus,
        view=chain.data.view,
        checkpoint=stage2.run,
        output=str(tmp_path / "evaluation"),
        dial=(0.05, 0.5, 0.95),
        further=(0.5, 0.7),
        samples=4,
        tracking_uri=chain.data.tracking_uri,
    )
    first = evaluate(settings)
    # One of them is on the curve, too: it is measured once and the same.
    assert [row["requested"] for row in first.further] == [0.5, 0.7]
    assert [first.further[0]["quality"], first.further[0]["psnr"]] == [first.dial[1][1], first.curve["psnr"][1]]
    file = tmp_path / "evaluation" / "evaluation.json"
    written = json.loads(file.read_text())
    assert written.keys() == {
        *("digest", "quality", "dial", "dial_spearman", "dial_range", "psnr", "ssim", "metrics"),
        *(
            "outside",
            "outside_metrics",
            "curve",
            "further",
            "fidelity",
            "high_quality",
            "samples",
            "checkpoint",
            "lineage",
            "output",
            "weights_digest",
        ),
    }
    assert written["quality"].keys() == {"lq", "hq", "restored"}
    assert written["psnr"].keys() == written["ssim"].keys() == {"lq", "restored"}
    assert [setting for setting, _ in written["dial"]] == [0.05, 0.5, 0.95]
    # The labels know rank alone, and it was in the loss: another network judges.
    assert written["metrics"]["rank"]["in_loss"] is True and written["metrics"]["rank_judge"]["in_loss"] is False
    assert written["outside_metrics"] == ["rank_judge"]
    assert written["outside"]["restored"] == written["metrics"]["rank_judge"]["restored"]
    with pytest.raises(UsageError, match="rank was in the loss"):
        evaluate(dataclasses.replace(settings, outside=["rank"]))
    assert written["weights_digest"] == metadata(stage2)["weights_digest"]
    assert len(list((tmp_path / "evaluation" / "lq").iterdir())) == first.samples == 4
    before = {path: path.stat().st_mtime_ns for path in file.parent.rglob("*")}
    assert evaluate(settings) == first
    assert {path: path.stat().st_mtime_ns for path in file.parent.rglob("*")} == before
    client, training_run = MlflowClient(chain.data.tracking_uri), stage2.mlflow_run

    def logged() -> list[Run]:
        return list(client.search_runs([client.get_run(training_run).info.experiment_id], BELOW.format(training_run)))

    (run,) = logged()
    figures = run.data.metrics
    assert figures["evaluation/quality/restored"] == first.quality["restored"]
    assert figures["evaluation/outside/restored"] == first.outside["restored"]
    assert run.info.status == "FINISHED" and run.data.params["samples"] == "4"
    curve = client.get_metric_history(run.info.run_id, "dial/quality")
    assert sorted([point.step / 100, point.value] for point in curve) == first.dial
    assert {"evaluation.json", "montage.png"} == {each.path for each in client.list_artifacts(run.info.run_id)}
    (point,) = client.get_metric_history(training_run, "evaluation/quality/restored")
    assert (point.step, point.value) == (4, first.quality["restored"])
    other = evaluate(dataclasses.replace(settings, seed=1))
    assert len(logged()) == 2
    with pytest.raises(UsageError, match=rf"no run {training_run}.*--tracking-uri"):
        evaluate(dataclasses.replace(settings, tracking_uri=f"sqlite:///{tmp_path}/another.db"))
    assert other.digest != first.digest and other.psnr != first.psnr


def test_a_picture_that_cannot_be_restored_is_a_row(chain: Chain, stage2: TrainResult, tmp_path: Path) -> None:
    source = shutil.copytree(chain.folder / "pictures", tmp_path / "pictures")
    for path in sorted(source.iterdir())[3:]:
        path.unlink()
    (source / "cut.png").write_bytes((source / "00.png").read_bytes()[:200])
    here = SchedulingConfig(workers=0)
    settings = RestoreConfig(model=stage2.run, input=str(source), output=str(tmp_path / "restored"), scheduling=here)
    first = restore(settings)
    assert (first.inputs, first.restored, first.failed, first.skipped) == (4, 3, 1, 0)
    rows = {row["relpath"]: row for row in map(json.loads, (tmp_path / "restored" / RECORD).open())}
    assert rows["cut.png"]["output"] is None and rows["cut.png"]["error"].startswith("truncated")
    assert not (tmp_path / "restored" / "cut.png").exists()
    assert decode((tmp_path / "restored" / "00.png").read_bytes()).array.shape == (64, 64, 3)
    again = restore(settings)
    assert (again.inputs, again.restored, again.failed, again.skipped) == (4, 3, 1, 3)
    assert restore(dataclasses.replace(settings, quality=0.2)).skipped == 0


def test_a_newer_checkpoint_restores_anew(chain: Chain, stage2: TrainResult, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    shutil.copy(chain.folder / "pictures" / "00.png", source)
    kept = sorted((Path(stage2.run) / "checkpoints").glob("step_*"))
    assert [path.name[:13] for path in kept] == ["step_00000002", "step_00000004"]
    run = tmp_path / "run"
    here = SchedulingConfig(workers=0)
    settings = RestoreConfig(model=str(run), input=str(source), output=str(tmp_path / "restored"), scheduling=here)
    for path in kept:
        shutil.copytree(path, run / "checkpoints" / path.name)
        assert restore(settings).skipped == 0
        assert restore(settings).skipped == 1


@pytest.mark.slow
def test_torchrun_trains_on_two_ranks(chain: Chain, tmp_path: Path) -> None:
    job = Job(chain.data.stage1("torchrun", launcher="torchrun"), tmp_path)
    job.command[:1] = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = job.finish(job.start(), 0)
    assert (result["status"], result["step"]) == ("done", 12)
    assert metadata(result)["world_size"] == 2 and metadata(result)["samples_seen"] == 48
    settings = chain.data.stage1("torchrun")
    assert steps_of(settings, result["mlflow_run"]) == [2, 4, 6, 8, 10, 12]


def test_a_signal_after_a_training_means_what_it_meant_before(chain: Chain) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_stage1(chain.data.stage1("signals", steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_without_its_server_a_run_goes_on_and_no_run_begins(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = "http://me:secret@127.0.0.1:9"
    settings = chain.data.stage1("away", runs=str(tmp_path), tracking_uri=away)
    with pytest.raises(AwayError, match="cannot be used"):
        train_stage1(settings)
    assert not any(tmp_path.iterdir())

    here = dataclasses.replace(settings, tracking_uri=chain.data.tracking_uri)
    corpus = Corpus(here.corpus)
    view = read_view(corpus, here.view)
    prepared, storage = prepare(here, corpus, view), Storage.open(here.run_url)
    first = tracked_run(here, prepared, view, "digest", storage)
    with pytest.raises(AwayError):  # another server has another run
        tracked_run(settings, prepared, view, "digest", storage)
    record = json.loads(storage.read(TRACKED))
    assert record["run_id"] == first.run_id
    storage.publish(TRACKED, json.dumps({**record, "server": "http://***@127.0.0.1:9"}).encode())
    again = tracked_run(settings, prepared, view, "digest", storage)
    assert again == dataclasses.replace(first, tracking_uri=away)
    assert "GOES ON WITHOUT MLFLOW" in caplog.text and "secret" not in caplog.text


def test_points_wait_in_the_workspace(chain: Chain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IQPIR_WORKSPACE", str(tmp_path / "workspace"))
    result = train_stage1(chain.data.stage1("spooled", steps=2, checkpoint_every=2))
    spool = tmp_path / "workspace" / "spool" / result.mlflow_run
    (line,) = (spool / "points.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
    assert (spool / "points.delivered").read_text() == str(os.path.getsize(spool / "points.jsonl"))
