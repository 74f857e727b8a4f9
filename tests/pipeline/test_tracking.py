"""One run for life, no point lost or doubled, and a training that never notices the server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import mlflow.data
import numpy as np
import pytest
import requests
from mlflow import MlflowClient

from iqpir.errors import UsageError
from pipeline.tracking.run_log import NONFINITE
from pipeline.tracking.runs import (
    RunHandle,
    RunLog,
    end_run,
    find_run,
    log_dataset,
    open_run,
    reachable,
    tracking_location,
)
from pipeline.tracking.spool import Spool


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: making its tables takes seconds."""
    return tracking_location("", tmp_path_factory.mktemp("tracking"))


@pytest.fixture
def handle(uri: str) -> RunHandle:
    return open_run(uri, "tests", uuid.uuid4().hex, "a run", {}, {})


def history(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(handle.tracking_uri).get_metric_history(handle.run_id, key)
    return sorted((point.step, point.value) for point in points)


@pytest.mark.parametrize("key", ["plain@1", "o'brien", '"quoted"', "both'\"", "back\\", "100%_x;--", "züg\nrich"])
def test_any_run_key_leads_to_the_same_run(uri: str, key: str) -> None:
    first = open_run(uri, "keys", key, "first", {}, {})
    assert open_run(uri, "keys", key, "again", {}, {}) == first
    assert find_run(uri, "keys", key) == first
    assert open_run(uri, "keys", key + "x", "other", {}, {}).run_id != first.run_id


def test_a_second_run_with_the_key_is_refused(uri: str, handle: RunHandle) -> None:
    client = MlflowClient(uri)
    key = client.get_run(handle.run_id).data.tags["run_key"]
    client.create_run(handle.experiment_id, tags={"run_key": key})
    with pytest.raises(UsageError, match="2 runs have the key"):
        open_run(uri, "tests", key, "a run", {}, {})


def test_params_are_written_once_and_a_change_becomes_a_tag(uri: str) -> None:
    params = {"lr": 1e-4, "network": {"alpha": 0.8}, **{f"p{i}": i for i in range(150)}}
    handle = open_run(uri, "tests", "drift", "a run", params, {"stage": "stage1"})
    open_run(uri, "tests", "drift", "a run", {**params, "lr": 2e-4, "new": 1}, {"stage": "stage1"})
    data = MlflowClient(uri).get_run(handle.run_id).data
    assert data.params["lr"] == "0.0001" and data.params["network.alpha"] == "0.8" and data.params["new"] == "1"
    assert len(data.params) == 153
    assert data.tags["drift.lr"] == "0.0001 -> 0.0002" and data.tags["stage"] == "stage1"


def test_a_finished_run_is_running_again_when_it_is_opened(uri: str, handle: RunHandle) -> None:
    client = MlflowClient(uri)
    assert end_run(handle, "FAILED") and client.get_run(handle.run_id).info.status == "FAILED"
    open_run(uri, "tests", client.get_run(handle.run_id).data.tags["run_key"], "a run", {}, {})
    assert client.get_run(handle.run_id).info.status == "RUNNING"


def test_artifacts_of_a_database_lie_beside_it(uri: str, handle: RunHandle) -> None:
    root = Path(uri.removeprefix("sqlite:///")).parent
    assert MlflowClient(uri).get_run(handle.run_id).info.artifact_uri.startswith(root.as_uri())


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "postgresql://me:secret@127.0.0.1:9/runs"])
def test_a_server_that_is_away_is_a_usage_error_within_seconds(address: str) -> None:
    started = time.monotonic()
    with pytest.raises(UsageError, match="cannot be used") as caught:
        reachable(address)
    assert time.monotonic() - started < 10
    assert "secret" not in str(caught.value)


def test_tracking_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tracking_location("", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_location().endswith("iqpir-workspace/mlflow.db")
    assert tracking_location("sqlite:///relative.db") == f"sqlite:///{Path.cwd()}/relative.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_location("", tmp_path) == "http://host:5000"
    assert tracking_location("databricks") == "databricks"
    for wrong in (str(tmp_path), tmp_path.as_uri()):
        with pytest.raises(UsageError, match="no MLflow server"):
            tracking_location(wrong)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI"):
        tracking_location("", "s3://bucket/workspace")


def test_the_view_is_logged_as_training_data_once(handle: RunHandle) -> None:
    for _ in range(2):
        log_dataset(handle, "hq@v0001", "0123456789ab", "s3://bucket/corpus", "training")
    (entry,) = MlflowClient(handle.tracking_uri).get_run(handle.run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("hq@v0001", "0123456789ab")
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]
    assert mlflow.data.get_source(entry).uri == "s3://bucket/corpus"


def test_every_finite_point_and_picture_arrives(handle: RunHandle, tmp_path: Path) -> None:
    run_log = RunLog(handle, tmp_path)
    for step in range(30):
        run_log.metrics({"loss": float("nan") if step in (3, 4) else step / 2, "odd [name]": 1.0}, step)
    run_log.image("val/face 1", np.full((8, 12, 3), 77, np.uint8), 10)
    assert run_log.close("FINISHED") == 0
    assert history(handle, "loss") == [(step, step / 2) for step in range(30) if step not in (3, 4)]
    assert history(handle, NONFINITE) == [(3, 1.0), (4, 2.0)]
    assert len(history(handle, "odd _name_")) == 30
    client = MlflowClient(handle.tracking_uri)
    (name,) = [item.path for item in client.list_artifacts(handle.run_id, "images") if item.path.endswith("png")]
    assert name.startswith("images/val~face 1+step+10+")
    assert client.get_run(handle.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("same_node", [True, False])
def test_a_resumed_training_doubles_no_point(handle: RunHandle, tmp_path: Path, same_node: bool) -> None:
    first = RunLog(handle, tmp_path / "a")
    for step in range(20):
        first.metrics({"loss": float(step)}, step)
    first.image("preview", np.zeros((4, 4, 3), np.uint8), 12)
    first.close()
    again = RunLog(handle, tmp_path / ("a" if same_node else "b"))
    for step in range(10, 25):
        again.metrics({"loss": float(step), "late": 1.0}, step)
    again.image("preview", np.zeros((4, 4, 3), np.uint8), 12)
    assert again.close() == 0
    assert history(handle, "loss") == [(step, float(step)) for step in range(25)]
    assert [step for step, _ in history(handle, "late")] == list(range(10, 25))
    pictures = MlflowClient(handle.tracking_uri).list_artifacts(handle.run_id, "images")
    assert len([item for item in pictures if item.path.endswith(".png")]) == 1


def test_a_point_of_an_earlier_step_is_kept(handle: RunHandle, tmp_path: Path) -> None:
    run_log = RunLog(handle, tmp_path)
    run_log.metrics({"val": 2.0}, 20)
    assert run_log.flush() == 0
    run_log.metrics({"val": 1.0}, 10)
    run_log.metrics({"val": 9.0}, 20)
    assert run_log.close() == 0
    assert history(handle, "val") == [(10, 1.0), (20, 2.0)]


def test_a_delivery_whose_confirmation_was_lost_is_recognised(handle: RunHandle, tmp_path: Path) -> None:
    run_log = RunLog(handle, tmp_path)
    for step in range(5):
        run_log.metrics({"loss": float(step)}, step)
    run_log.close()
    (tmp_path / handle.run_id / "points.delivered").unlink()
    assert RunLog(handle, tmp_path).close() == 0
    assert history(handle, "loss") == [(step, float(step)) for step in range(5)]


def test_without_a_server_logging_is_quick_and_counts_what_is_left(tmp_path: Path) -> None:
    run_log = RunLog(RunHandle("0" * 32, "1", "http://127.0.0.1:9"), tmp_path)
    started = time.monotonic()
    for step in range(1000):
        run_log.metrics({"a": 1.0, "b": 2.0}, step)
    assert time.monotonic() - started < 2
    assert run_log.close(deadline_seconds=0.5) == 2000


def test_a_folder_that_cannot_be_written_costs_points_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run_log = RunLog(RunHandle("0" * 32, "1", "http://127.0.0.1:9"), tmp_path / "file")
    run_log.metrics({"a": 1.0}, 1)
    run_log.image("b", np.zeros((2, 2, 3), np.uint8), 1)
    assert run_log.close() == 2


def test_a_metric_the_server_refuses_does_not_hold_up_the_others(handle: RunHandle, tmp_path: Path) -> None:
    run_log = RunLog(handle, tmp_path)
    run_log.metrics({"a//b": 1.0, "good": 1.0}, 1)
    assert run_log.close(deadline_seconds=20) == 1
    assert history(handle, "good") == [(1, 1.0)]


def test_a_spool_survives_a_cut_at_every_byte_of_its_last_record(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "points")
    spool.append({"step": 1}, 3)
    spool.append({"step": 2}, 4)
    whole = spool.path.read_bytes()
    spool.close()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        spool.path.write_bytes(whole[:cut])
        again = Spool(tmp_path, "points")
        assert again.pending == 3 and again.append({"step": 9}, 1)
        chunk = again.read(100)
        assert chunk is not None and [record["step"] for record in chunk.records] == [1, 9]
        again.close()


def test_a_spool_remembers_what_was_delivered_and_refuses_more_than_its_size(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "points", max_bytes=100)
    kept = [step for step in range(20) if spool.append({"step": step})]
    assert 0 < len(kept) < 20 and spool.pending == len(kept) and spool.path.stat().st_size <= 100
    chunk = spool.read(2)
    assert chunk is not None and len(chunk.records) == 2
    spool.advance(chunk)
    spool.close()
    again = Spool(tmp_path, "points")
    rest = again.read(100)
    assert again.pending == len(kept) - 2 and rest is not None and rest.records[0]["step"] == 2
    again.advance(rest)
    assert again.read(100) is None and again.pending == 0
    again.close()


class Server:
    """A real ``mlflow server`` on a free port, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.url}/health", timeout=2).ok:
                    return
            except requests.RequestException:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.mark.slow
def test_a_killed_and_restarted_server_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Server(tmp_path)
    try:
        server.start()
        handle = open_run(server.url, "chaos", "run", "run", {}, {})
        run_log = RunLog(handle, tmp_path / "spool", period_seconds=0.05, longest_wait_seconds=1.0)
        for step in range(150):  # points arrive while the server dies
            run_log.metrics({"loss": float(step), "other": 1.0}, step)
            time.sleep(0.002)
        server.kill()
        started = time.monotonic()
        for step in range(150, 250):
            run_log.metrics({"loss": float(step), "other": 1.0}, step)
        run_log.image("preview", np.zeros((8, 8, 3), np.uint8), 250)
        assert time.monotonic() - started < 2, "logging waited for the dead server"
        assert run_log.flush(1.0) > 0, "the server was dead, yet everything is delivered"
        server.start()
        assert run_log.close("FINISHED", deadline_seconds=60) == 0
        for key in ("loss", "other"):
            counts = Counter(point for point, _ in history(handle, key))
            assert counts == Counter(range(250))
        spooled = (tmp_path / "spool" / handle.run_id / "points.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in spooled] == list(range(250))
        client = MlflowClient(server.url)
        pictures = [item.path for item in client.list_artifacts(handle.run_id, "images")]
        assert len([path for path in pictures if path.endswith(".png")]) == 1
        assert client.get_run(handle.run_id).info.status == "FINISHED"
    finally:
        server.kill()
