"""Train a stage: check everything in the driver, start workers, resume what an earlier start left.

A run is a folder ``<runs>/<name>`` with ``run.json`` (what it is made from; another configuration under the
same name is refused) and ``checkpoints/``. The same command continues it, on any number of workers.
"""

import dataclasses
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from iqpir.config import NetworkConfig, digest, preset
from iqpir.degradation.parameters import DegradationConfig
from iqpir.errors import UsageError
from iqpir.training.checkpoint import MANIFEST
from iqpir.training.distributed import Distributed
from iqpir.training.loop import BatchSource, FitConfig, fit
from iqpir.training.precision import PrecisionConfig
from pipeline.checkpoints import checkpoint_sink
from pipeline.command import from_dict, workspace
from pipeline.corpus import Corpus
from pipeline.encode import read_codes
from pipeline.feed import FeedConfig, IndexedFeed, Samples
from pipeline.launch import Launcher, Workers, launch
from pipeline.layout import to_json
from pipeline.progress import progress
from pipeline.storage import Storage
from pipeline.tracking import (
    RunHandle,
    RunLog,
    end_run,
    log_dataset,
    open_run,
    reachable,
    tracking_location,
)
from pipeline.view import View, read_view

RUN = "run.json"
RESULT = "result.json"
PROGRESS = "progress.json"
_POLL_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every stage's training needs to know."""

    corpus: str
    """Folder or URL of the corpus."""
    view: str
    """View that is trained on: name or name@v0001."""
    name: str
    """Name of the run; its folder is ``runs``/``name``."""
    runs: str = field(default_factory=lambda: f"{workspace()}/runs")
    """Folder or URL for runs."""
    preset: str = "iqpir512"
    """Network sizes: tiny32, tiny64, small128, mid256, iqpir512 or codeformer512."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of the network configuration that differ from the preset's."""
    steps: int = 10000
    """Optimisation steps in all."""
    batch_size: int = 16
    """Samples of one step, over all workers."""
    seed: int = 2603
    """Of weights, order, flips and degradations."""
    log_every: int = 50
    """Steps between two log entries."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    preview_every: int = 0
    """Steps between two preview pictures; 0: none."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number format, memory layout, compilation."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    """How samples reach the loop."""
    launcher: Launcher = "ray"
    """``ray``: many nodes; ``torchrun``: started by it; ``local``: this process."""
    workers: Workers = field(default_factory=Workers)
    """How many training processes."""
    tracking_uri: str = ""
    """MLflow server or database; $MLFLOW_TRACKING_URI or the workspace's mlflow.db by default."""
    experiment: str = "iqpir"
    """MLflow experiment."""

    stage_name: ClassVar[str]
    operational: ClassVar[frozenset[str]] = frozenset(
        [
            "corpus",
            "view",
            "runs",
            "name",
            "log_every",
            "checkpoint_every",
            "preview_every",
            "keep",
            "launcher",
            "workers",
            "tracking_uri",
            "experiment",
            "feed",
            "stage1",
            "preset",
            "network",
        ]
    )
    """Fields that may change when a run goes on; what they lead to is in its lineage."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise UsageError(f"{self.name!r} is no name for a run.", "Use letters, digits, - and _.")
        if self.batch_size < 1 or self.batch_size % self.workers.count:
            raise UsageError(f"batch_size {self.batch_size} is no multiple of workers.count {self.workers.count}.")
        self.fit_config()

    def fit_config(self) -> FitConfig:
        """How long and how often, for the loop."""
        return FitConfig(
            steps=self.steps,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            preview_every=self.preview_every,
        )

    @property
    def run_url(self) -> str:
        """Folder of the run."""
        return f"{self.runs.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class TrainResult:
    """How a training ended, and where its checkpoint is."""

    run: str
    checkpoint: str
    status: str
    step: int
    resumed_from: int
    metrics: dict[str, float]
    mlflow_run: str
    lineage: dict[str, str]
    seconds: float

    @property
    def exit_code(self) -> int:
        """3 when it was stopped before its end; the same command goes on."""
        return 0 if self.status in ("done", "done earlier") else 3


@dataclass(frozen=True)
class Prepared:
    """What the driver found and every worker gets."""

    network: NetworkConfig
    lineage: dict[str, str]
    facts: dict[str, Any]
    """JSON values of the stage's own: digests, paths."""


@dataclass(frozen=True)
class Parts:
    """What a stage adds to the common training, in a worker."""

    stage: Any
    state: Any
    source: BatchSource


Prepare = Callable[[Any, Corpus, View], Prepared]
Build = Callable[[Any, Prepared, Distributed], Parts]


def run_training(training: Training, prepare: Prepare, worker: Callable[[dict[str, Any]], None]) -> TrainResult:
    """Driver of every stage: check, claim the run, track it, start the workers, collect the result.

    Raises:
        UsageError: corpus, view, stage-1 checkpoint or MLflow server are absent; the name belongs to another run.
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
    if finished is None:
        # Before the name is claimed: a server that is away leaves nothing behind.
        reachable(tracking_location(training.tracking_uri))
    if not storage.exists(RUN):  # the name of a run that cannot start is not taken
        reachable(tracking_location(training.tracking_uri))
    identity = _claim(training, prepared, storage)
    if finished is not None:
        return _result(training, storage, finished, "done earlier", prepared, started)
    handle = _track(training, prepared, view, identity)
    plan = {
        "training": dataclasses.asdict(training),
        "network": prepared.network.to_dict(),
        "lineage": prepared.lineage,
        "facts": prepared.facts,
        "handle": dataclasses.asdict(handle),
        "spool": str(_spool_folder()),
        "ray_storage": storage.child("ray").url,
    }
    status = "FAILED"
    try:
        with _watching(training, storage):
            launch(worker, plan, training.launcher, training.workers, training.name)
        result = json.loads(storage.read(RESULT))
        status = "FINISHED" if result["status"] == "done" else "KILLED"
    finally:
        end_run(handle, status)
    return _result(training, storage, result, result["status"], prepared, started)


def run_worker(plan: Mapping[str, Any], training_type: type[Training], build: Build) -> None:
    """What each worker runs: build the parts from the plan, fit, and (rank 0) record how it ended."""
    training = from_dict(training_type, plan["training"])
    prepared = Prepared(NetworkConfig.from_dict(plan["network"]), dict(plan["lineage"]), dict(plan["facts"]))
    device = _device(training.launcher)
    distributed = Distributed.current(device)
    torch.manual_seed(training.seed)
    parts = build(training, prepared, distributed)
    handle = RunHandle(**plan["handle"])
    run_log = RunLog(handle, Path(plan["spool"]))
    try:
        with (
            tempfile.TemporaryDirectory(prefix=f"iqpir-{training.name}-") as folder,
            _step_meter(training, distributed) as report,
            _stop_flag() as stop,
        ):
            result = fit(
                parts.stage,
                parts.state,
                parts.source,
                config=training.fit_config(),
                sink=checkpoint_sink(training.run_url, training.keep),
                log=run_log,
                workspace=Path(folder),
                distributed=distributed,
                lineage=prepared.lineage,
                stop=stop,
                progress=report,
            )
    finally:
        if distributed.is_main:
            run_log.close()
    if distributed.is_main:
        outcome = {**dataclasses.asdict(result), "mlflow_run": handle.run_id}
        Storage.open(training.run_url).publish(RESULT, to_json(outcome))
    # Under torchrun each rank is its own driver, and reads the result next.
    distributed.barrier()


@contextmanager
def _step_meter(training: Training, distributed: Distributed) -> Iterator[Callable[[int, int], None]]:
    """Progress by step number, on rank 0 alone; a worker of Ray leaves it where the driver looks."""
    if not distributed.is_main:
        yield lambda step, steps: None
    elif training.launcher == "ray":
        storage, spoken = Storage.open(training.run_url), 0.0

        def leave(step: int, steps: int) -> None:
            nonlocal spoken
            if step == steps or time.monotonic() - spoken > _POLL_SECONDS:
                spoken = time.monotonic()
                storage.publish(PROGRESS, to_json({"step": step}))

        yield leave
    else:
        with _meter(training) as show:
            yield show


@contextmanager
def _watching(training: Training, storage: Storage) -> Iterator[None]:
    """In the driver: show how far the workers of Ray are, whose output stays on their nodes."""
    if training.launcher != "ray":
        yield
        return
    ended = threading.Event()

    def watch(show: Callable[[int, int], None]) -> None:
        while not ended.wait(_POLL_SECONDS):
            if storage.exists(PROGRESS):
                show(json.loads(storage.read(PROGRESS))["step"], training.steps)

    with _meter(training) as show:
        thread = threading.Thread(target=watch, args=(show,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def _meter(training: Training) -> Iterator[Callable[[int, int], None]]:
    """A bar of the run's steps; steps before a resume count as done."""
    with progress(training.steps, training.name) as meter:
        last = 0

        def show(step: int, steps: int) -> None:
            nonlocal last
            meter.advance(step - last, f"step {step} of {steps}")
            last = step

        yield show


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


def _device(launcher: Launcher) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launcher == "ray":
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """True after SIGTERM or SIGINT, until the block ends. Ray's workers train in another thread, without signals."""
    raised = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield raised.is_set
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: raised.set()) for number in numbers]
    try:
        yield raised.is_set
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _spool_folder() -> Path:
    """Where points wait for MLflow, on each node: in the workspace, so that a restarted worker finds them.

    A remote workspace has no such place; then it is a fixed folder below the system's temporary one.
    """
    folder = workspace().removeprefix("file://")
    if "://" in folder:
        return Path(tempfile.gettempdir()) / "iqpir-spool"
    return Path(folder).expanduser().resolve() / "spool"


def network_config(training: Training, base: NetworkConfig | None = None, **derived: Any) -> NetworkConfig:
    """The network of a training: the preset (or ``base``), then derived values, then the user's.

    Raises:
        UsageError: an unknown field.
    """
    values = (preset(training.preset) if base is None else base).to_dict()
    unknown = sorted(training.network.keys() - values.keys())
    if unknown:
        raise UsageError(f"A network has no field {unknown[0]!r}.", f"Known: {', '.join(values)}.")
    return NetworkConfig.from_dict({**values, **derived, **training.network})


def lineage_of(corpus: Corpus, view: View) -> dict[str, str]:
    """Digests of what a training on ``view`` is made from."""
    return {
        "manifest": corpus.manifest().digest,
        "view": view.digest,
        "view_name": view.reference,
        "calibration": str(view.facts["calibration"]),
    }


def training_feed(
    training: Training,
    prepared: Prepared,
    distributed: Distributed,
    degradation: DegradationConfig | None = None,
    schedule: Callable[[int], DegradationConfig] | None = None,
) -> BatchSource:
    """This rank's batches of the view's train split; with codes where the lineage names a code cache."""
    corpus = Corpus(training.corpus)
    rows = read_view(corpus, prepared.lineage["view_name"]).split("train")
    codes = None
    if "codes" in prepared.lineage:
        books = 2 if prepared.network.codebooks == "dual" else 1
        side = prepared.network.latent_size
        codes = read_codes(corpus, prepared.facts["codes"], rows, (books, side, side))
    samples = Samples(
        training.corpus, rows, training.feed, prepared.network, degradation, codes, training.seed, schedule
    )
    rank, world, device = distributed.rank, distributed.world_size, distributed.device
    if training.feed.kind == "ffcv":
        from pipeline.ffcv_feed import FfcvFeed

        beton = Path(training.feed.beton)
        return FfcvFeed(beton, prepared.lineage["view"], samples, training.batch_size, rank, world, device)
    return IndexedFeed(samples, training.batch_size, rank, world, device)
