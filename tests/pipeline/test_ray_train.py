"""Ray Train: two workers learn what one does, and the death of one costs no step and no second MLflow run."""

import dataclasses
import signal
import time
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from safetensors.torch import load_file

from iqpir.errors import UsageError
from iqpir.networks.codebook import EmaConfig
from iqpir.training import checkpoint
from pipeline.stage1 import Stage1Training, prepare, train_stage1
from pipeline.training.driver import run_training
from pipeline.training.launch import Workers
from tests.chain import STAGE1, Chain
from tests.pipeline.mortal_training import DIES_AFTER, GRAVE, mortal_worker
from tests.pipeline.training_job import Job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
TWO = Workers(count=2, cpus=1.0)


def address() -> str:
    """Of the session's Ray."""
    return str(ray.get_runtime_context().gcs_address)


def runs_of(chain: Chain, name: str) -> list[str]:
    """Ids of the MLflow runs with that name."""
    client = MlflowClient(chain.data.tracking_uri)
    experiment = client.get_experiment_by_name("iqpir")
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return [run.info.run_id for run in found]


def logged_steps(chain: Chain, run_id: str) -> list[int]:
    history = MlflowClient(chain.data.tracking_uri).get_metric_history(run_id, "loss")
    return [point.step for point in sorted(history, key=lambda point: point.step)]


def test_two_workers_learn_what_one_does(chain: Chain) -> None:
    # Where codes are placed by k-means, ranks offer it other samples than one process would.
    unplaced = dataclasses.replace(STAGE1, warmup_steps=0, codebook_ema=EmaConfig(kmeans_iterations=0, revive_every=0))
    one = train_stage1(chain.data.stage1("one", stage=unplaced))
    two = train_stage1(chain.data.stage1("two", stage=unplaced, launcher="ray", workers=TWO))
    assert (two.status, two.step) == ("done", 12)
    assert runs_of(chain, "two") == [two.mlflow_run]
    assert logged_steps(chain, two.mlflow_run) == [2, 4, 6, 8, 10, 12]
    found = checkpoint.load(Path(two.checkpoint))
    assert (found.metadata["world_size"], found.metadata["samples_seen"]) == (2, 48)
    for file in ("network.safetensors", "codebook.safetensors"):
        expected, ours = load_file(Path(one.checkpoint) / file), load_file(Path(two.checkpoint) / file)
        assert expected.keys() == ours.keys()
        for key, value in expected.items():
            apart = (ours[key].double() - value.double()).abs()
            # A latent between two codes may go to the other one. A bias of keys has no gradient but rounding,
            # which Adam makes steps of.
            assert apart.quantile(0.9) < (1e-3 if key.endswith(".k.bias") else 1e-4), f"{file} {key}"
            assert apart.max() < 1e-3 or "codebook" in file or "embedding" in key, f"{file} {key}"
    assert two.metrics["common_usage"] == pytest.approx(one.metrics["common_usage"], abs=0.02)
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-3)


def test_a_dead_worker_is_replaced_and_nothing_is_lost(chain: Chain) -> None:
    settings = chain.data.stage1("killed", launcher="ray", workers=TWO, steps=30, checkpoint_every=5)
    result = run_training(settings, prepare, mortal_worker)
    assert (Path(settings.run_url) / GRAVE).exists()
    assert (result.status, result.step) == ("done", 30)
    assert result.resumed_from == DIES_AFTER // 5 * 5
    assert checkpoint.load(Path(result.checkpoint)).metadata["samples_seen"] == 120
    assert runs_of(chain, "killed") == [result.mlflow_run]
    steps = logged_steps(chain, result.mlflow_run)
    assert steps == list(range(2, 31, 2))


def test_a_stopped_training_on_ray_writes_a_checkpoint_and_goes_on_with_other_workers(
    chain: Chain, tmp_path: Path
) -> None:
    def settings(workers: Workers) -> Stage1Training:
        return chain.data.stage1("stopped", launcher="ray", workers=workers, steps=100_000, checkpoint_every=10)

    before = 0
    for attempt, number, workers in ((1, signal.SIGTERM, TWO), (2, signal.SIGINT, Workers(cpus=1.0))):
        job = Job(settings(workers), tmp_path)
        process = job.start(RAY_ADDRESS=address())
        job.wait_for_checkpoint(process, attempt)
        process.send_signal(number)
        ended = job.finish(process, 3)
        assert ended["status"] == "stopped" and 10 <= ended["step"] < 100_000
        found = checkpoint.load(Path(ended["checkpoint"]))
        assert (found.step, found.metadata["world_size"]) == (ended["step"], workers.count)
        assert found.samples_seen == 4 * found.step
        assert MlflowClient(chain.data.tracking_uri).get_run(ended["mlflow_run"]).info.status == "KILLED"
        assert ended["resumed_from"] == before
        before = ended["step"]
    assert "first worker: iqpir.training.loop: Resumed stage1 at step" in job.said
    assert runs_of(chain, "stopped") == [ended["mlflow_run"]]


@pytest.mark.parametrize("own", [True, False], ids=["while Ray starts", "while Ray waits for room"])
def test_a_training_stopped_before_its_first_step_may_be_started_again(own: bool, chain: Chain, tmp_path: Path) -> None:
    name = f"unbegun-{own}"
    settings = chain.data.stage1(name, launcher="ray", workers=Workers(cpus=1.0 if own else 64.0))
    job = Job(settings, tmp_path)
    process = job.start(**({} if own else {"RAY_ADDRESS": address()}))
    while not (job.run / "run.json").exists():
        time.sleep(0.05)
    time.sleep(1.0 if own else 5.0)  # run.json is written right before Ray is needed
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (3, ""), err
    assert "stopped" in err.splitlines()[-1].lower() and "same command" in err.splitlines()[-1]
    (run_id,) = runs_of(chain, name)
    assert MlflowClient(settings.tracking_uri).get_run(run_id).info.status == "KILLED"


def test_what_a_worker_says_to_the_user_reaches_the_user(chain: Chain) -> None:
    settings = chain.data.stage1("wrong-size", launcher="ray", preset="tiny64", workers=Workers(max_failures=0))
    with pytest.raises(UsageError, match="A sample is 32x32, the network wants 64x64"):
        train_stage1(settings)
    (run_id,) = runs_of(chain, "wrong-size")
    assert MlflowClient(chain.data.tracking_uri).get_run(run_id).info.status == "FAILED"
