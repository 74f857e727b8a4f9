"""Train a stage: check everything in the driver, start workers, resume what an earlier start left.

A run is a folder ``<runs>/<name>`` with ``run.json`` (what it is made from; another configuration under the
same name is refused), ``mlflow.json`` and ``checkpoints/``. The same command continues it, on any number of workers.
"""

import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iqpir.config import digest
from iqpir.errors import UsageError
from iqpir.training.checkpoint import MANIFEST
from pipeline.command import workspace
from pipeline.corpus import Corpus
from pipeline.layout import to_json
from pipeline.stopping import StoppedError
from pipeline.storage import Storage
from pipeline.tracking.runs import (
    AwayError,
    RunHandle,
    end_run,
    log_dataset,
    open_run,
    reachable,
    shown,
    tracking_location,
)
from pipeline.training.config import RESULT, Prepare, Prepared, Training, TrainResult
from pipeline.training.launch import launch
from pipeline.training.signs import Signs
from pipeline.training.step_meter import watching
from pipeline.view import View, read_view

log = logging.getLogger(__name__)
RUN = "run.json"
TRACKED = "mlflow.json"
"""In the folder of a run: which run of MLflow it is."""


def run_training(training: Training, prepare: Prepare, worker: Callable[[dict[str, Any]], None]) -> TrainResult:
    """Driver of every stage: check, claim the run, track it, start the workers, collect the result.

    Raises:
        UsageError: corpus, view or stage-1 checkpoint are absent; the name belongs to another run.
        AwayError: the MLflow server is, and this is the first start.
        VerificationError: an artifact is not what its digest says.
        PermanentError: the workers failed for good.
    """
    started = time.monotonic()
    corpus = Corpus(training.corpus)
    view = read_view(corpus, training.view)
    view.split("train")
    prepared = prepare(training, corpus, view)
    storage = Storage.open(training.run_url)
    finished = _finished(storage, training.steps)
    if finished is None and not storage.exists(TRACKED):
        # Before the name is claimed: a server that is away leaves nothing behind.
        reachable(tracking_location(training.tracking_uri))
    identity = _claim(training, prepared, storage)
    if finished is not None:
        return _result(training, storage, finished, "done earlier", prepared, started)
    handle = tracked_run(training, prepared, view, identity, storage)
    signs = Signs(storage)
    plan = {
        "training": dataclasses.asdict(training),
        "network": prepared.network.to_dict(),
        "lineage": prepared.lineage,
        "facts": prepared.facts,
        "handle": dataclasses.asdict(handle),
        "spool": str(_spool_folder()),
        "start": signs.start,
        "ray_storage": storage.child("ray").url,
    }
    status = "FAILED"
    try:
        with watching(training, signs):
            launch(worker, plan, training.launcher, training.workers, training.name, signs)
        result = json.loads(storage.read(RESULT))
        status = "FINISHED" if result["status"] == "done" else "KILLED"
    except (StoppedError, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        end_run(handle, status)
    return _result(training, storage, result, result["status"], prepared, started)


def _claim(training: Training, prepared: Prepared, storage: Storage) -> str:
    """Make the run's name stand for this configuration, or find that it already does.

    Returns:
        digest of what the run is made from.
    """
    values = {key: value for key, value in dataclasses.asdict(training).items() if key not in training.operational}
    identity = {
        "stage": training.stage_name,
        "training": values,
        "fit": training.feed.fit,
        "flip": training.feed.flip,
        **({"shards_per_block": training.feed.shards_per_block} if training.feed.shards_per_block else {}),
        "network": prepared.network.to_dict(),
        "lineage": prepared.lineage,
    }
    ours = json.loads(to_json(identity))
    theirs = json.loads(storage.create(RUN, to_json(identity)))
    different = sorted(_differences(ours, theirs))
    if different:
        raise UsageError(
            f"The run {training.run_url} was started with another {', '.join(different)}.",
            "Choose another --name, or give it the values of its run.json.",
        )
    return digest(ours)


def _differences(ours: Any, theirs: Any, path: str = "") -> set[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return {
            name
            for key in ours.keys() | theirs.keys()
            for name in _differences(ours.get(key), theirs.get(key), f"{path}.{key}".removeprefix("."))
        }
    return set() if ours == theirs else {f"{path} ({theirs} there, {ours} here)"}


def _finished(storage: Storage, steps: int) -> dict[str, Any] | None:
    """The recorded result, if it is of the last step and its checkpoint is there."""
    if not storage.exists(RESULT):
        return None
    result: dict[str, Any] = json.loads(storage.read(RESULT))
    complete = [
        entry.path
        for entry in storage.list("checkpoints")
        if entry.path.startswith(f"checkpoints/step_{steps:08d}-") and entry.path.endswith(MANIFEST)
    ]
    return result if result["step"] >= steps and complete else None


def tracked_run(training: Training, prepared: Prepared, view: View, identity: str, storage: Storage) -> RunHandle:
    """The training's run in MLflow; the one of an earlier start while the server is away.

    Raises:
        AwayError: this is the first start, or the first that names this server.
    """
    uri = tracking_location(training.tracking_uri)
    known = json.loads(storage.read(TRACKED)) if storage.exists(TRACKED) else {}
    try:
        handle = _track(training, prepared, view, identity)
    except AwayError as error:
        if known.get("server") != shown(uri):
            raise
        log.warning(
            "TRAINING GOES ON WITHOUT MLFLOW: %s What it logs waits in %s and is delivered when the server is back.",
            error,
            _spool_folder(),
        )
        return RunHandle(known["run_id"], known["experiment_id"], uri)
    facts = {"run_id": handle.run_id, "experiment_id": handle.experiment_id, "server": shown(uri)}
    if facts != known:
        storage.publish(TRACKED, to_json(facts))
    return handle


def _track(training: Training, prepared: Prepared, view: View, identity: str) -> RunHandle:
    handle = open_run(
        tracking_location(training.tracking_uri),
        training.experiment,
        f"{training.name}@{identity}",
        training.name,
        dataclasses.asdict(training),
        {
            "stage": training.stage_name,
            **{f"lineage.{key}": value for key, value in prepared.lineage.items()},
        },
    )
    log_dataset(handle, view.reference, view.digest, training.corpus, "training")
    return handle


def _result(
    training: Training,
    storage: Storage,
    result: Mapping[str, Any],
    status: str,
    prepared: Prepared,
    started: float,
) -> TrainResult:
    checkpoints = sorted(
        entry.path.split("/")[1] for entry in storage.list("checkpoints") if entry.path.endswith(MANIFEST)
    )
    return TrainResult(
        run=training.run_url,
        checkpoint=storage.uri(f"checkpoints/{checkpoints[-1]}") if checkpoints else "",
        status=status,
        step=int(result["step"]),
        resumed_from=int(result["resumed_from"]),
        metrics=dict(result["metrics"]),
        mlflow_run=str(result.get("mlflow_run", "")),
        lineage=prepared.lineage,
        seconds=time.monotonic() - started,
    )


def _spool_folder() -> Path:
    """Where points wait for MLflow, on each node: in the workspace, so that a restarted worker finds them.

    A remote workspace has no such place; then it is a fixed folder below the system's temporary one.
    """
    folder = workspace().removeprefix("file://")
    if "://" in folder:
        return Path(tempfile.gettempdir()) / "iqpir-spool"
    return Path(folder).expanduser().resolve() / "spool"
