"""The training loop: feed a stage, log, checkpoint, stop, resume. It knows no storage, server or cluster."""

import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from iqpir.errors import IncompleteError, PermanentError, UsageError
from iqpir.stages.batch import Batch
from iqpir.training import checkpoint
from iqpir.training.distributed import SINGLE, Distributed
from iqpir.training.state import TrainState, capture_rng
from iqpir.training.throughput import counted, peak_flops, resident_gib

logger = logging.getLogger(__name__)


class _DataclassInstance(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


class Stage(Protocol):
    """One of the three trainings."""

    name: str

    @property
    def config(self) -> _DataclassInstance:
        """The stage's configuration."""
        ...

    def step(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """One optimisation step; returns detached, finite 0-d tensors on the device. No I/O."""
        ...

    def health(self, state: TrainState) -> dict[str, float]:
        """Facts gathered since the last call, over all ranks; starts gathering anew. Called on every rank."""
        ...

    def preview(self, state: TrainState, batch: Batch) -> Tensor:
        """What the averaged network makes of ``batch``: [H, W, 3] uint8. Changes no state."""
        ...


class BatchSource(Protocol):
    """Where batches come from."""

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """This rank's part of each global batch, from global position ``samples_seen`` on, without end."""
        ...


class CheckpointSink(Protocol):
    """Where checkpoints go. Called on rank 0 (``save``) and on every rank (``latest``)."""

    def save(self, directory: Path, step: int) -> None:
        """Keep the finished checkpoint ``directory``: move it, or copy it before this returns."""
        ...

    def latest(self, into: Path) -> Path | None:
        """The newest checkpoint that verifies, as a local directory (fetched under ``into``), or None."""
        ...


class MetricLog(Protocol):
    """Where numbers and pictures go; called on rank 0 only. Must not raise for its server's sake."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers after ``step`` steps."""
        ...

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture (uint8 HWC) after ``step`` steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how often."""

    steps: int = 1000
    """Optimisation steps in all, those before a resume included."""
    log_every: int = 50
    """Steps between two reports; the only times the device is waited for."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is always one at the end."""
    preview_every: int = 0
    """Steps between two preview pictures; 0 makes none."""
    stop_every: int = 10
    """Steps between two looks at the stop flag of several ranks, which must agree; one rank always looks."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "stop_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} must be at least 1.")
        if self.preview_every < 0:
            raise UsageError(f"preview_every {self.preview_every} must not be negative.")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a training ended."""

    status: Literal["done", "stopped"]
    """``stopped``: the stop flag was raised; the same call goes on from the checkpoint."""
    step: int
    """Steps done in all."""
    samples_seen: int
    """Samples consumed in all, over all ranks."""
    resumed_from: int
    """Step this call started at."""
    metrics: dict[str, float]
    """Last report."""


def fit(
    stage: Stage,
    state: TrainState,
    source: BatchSource,
    *,
    config: FitConfig,
    sink: CheckpointSink,
    log: MetricLog,
    workspace: Path,
    distributed: Distributed = SINGLE,
    lineage: Mapping[str, str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> FitResult:
    """Train until ``config.steps``, from the newest checkpoint of ``sink`` or from ``state`` as it is.

    On a CPU, stopping and going on gives bitwise the weights of an uninterrupted training.

    Args:
        stage: what a step is.
        state: fresh state of the stage; changed in place.
        source: where batches come from.
        config: how long and how often.
        sink: where checkpoints go.
        log: where numbers go.
        workspace: local folder for checkpoints in the making.
        distributed: this process's rank.
        lineage: digests of what this training is made from, kept in every checkpoint.
        stop: asked between steps; true (on any rank) means checkpoint now and return "stopped".
        progress: called after each step on every rank with (step, steps).

    Raises:
        PermanentError: a loss is not finite, or ranks drifted apart.
        IncompleteError: ranks found different checkpoints; run again.
        UsageError: the newest checkpoint is of another run.
    """
    run = _Run(stage, state, config, sink, log, workspace, distributed, lineage or {})
    resumed_from = run.resume()
    stopped = False
    with _closing(source.batches(state.samples_seen)) as batches:
        while state.step < config.steps and not stopped:
            run.step(batches)
            progress(state.step, config.steps)
            stopped = run.should_stop(stop)
            run.write(last=stopped or state.step >= config.steps)
    return FitResult(
        status="done" if state.step >= config.steps else "stopped",
        step=state.step,
        samples_seen=state.samples_seen,
        resumed_from=resumed_from,
        metrics=run.report.last,
    )


@contextmanager
def _closing(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Close a generator (and so its loader processes) when training ends."""
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()


@dataclass
class _Run:
    """What ``fit`` was given, and the three things it does with it: resume, step, write."""

    stage: Stage
    state: TrainState
    config: FitConfig
    sink: CheckpointSink
    log: MetricLog
    workspace: Path
    distributed: Distributed
    lineage: Mapping[str, str]

    def __post_init__(self) -> None:
        self.report = _Report(self.stage, self.distributed)
        self._shown: Batch | None = None

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one, and return the step it is of."""
        self.workspace.mkdir(parents=True, exist_ok=True)
        prefix = f"resume-{self.distributed.rank}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=self.workspace) as folder:
            directory = self.sink.latest(Path(folder))
            found = None if directory is None else checkpoint.load(directory)
            steps = self.distributed.gather(None if found is None else found.step)
            if len(set(steps)) > 1:
                raise IncompleteError(f"Ranks found checkpoints of different steps: {steps}.", "Run again.")
            if found is not None:
                found.restore(self.state, stage=self.stage.name, rank=self.distributed.rank)
                self.report.flops = float(found.metadata.get("flops_per_sample", 0.0))
                logger.info("Resumed %s at step %d from %s", self.stage.name, found.step, directory)
        return self.state.step

    def step(self, batches: Iterator[Batch]) -> None:
        """Take one batch and train on it."""
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        batch = batch.to(self.distributed.device)
        values = self._first(batch) if self.state.step == 0 else self.stage.step(self.state, batch)
        samples = len(batch) * self.distributed.world_size
        self.state.step += 1
        self.state.samples_seen += samples
        self.report.add(values, self.state.step, samples, waited)
        self._shown = batch

    def _first(self, batch: Batch) -> dict[str, Tensor]:
        """The very first step of a training, whose operations are counted; a resumed one knows them."""
        values, flops = counted(lambda: self.stage.step(self.state, batch))
        self.report.flops = flops / len(batch)
        return values

    def should_stop(self, stop: Callable[[], bool]) -> bool:
        """The stop flag, agreed between ranks."""
        if self.distributed.world_size == 1:
            return stop()
        return self.state.step % self.config.stop_every == 0 and self.distributed.any(stop())

    def write(self, *, last: bool) -> None:
        """Whatever is due after this step: report, preview, checkpoint."""
        step = self.state.step
        if last or step % self.config.log_every == 0:
            self.report.publish(self.state, self.log)
        due = self.config.preview_every and step % self.config.preview_every == 0
        if due and self._shown is not None and self.distributed.is_main:
            picture = self.stage.preview(self.state, self._shown)
            self.log.image("preview", picture.cpu().numpy(), step)
        if last or step % self.config.checkpoint_every == 0:
            self.report.require_finite()
            self._save()

    def _save(self) -> None:
        for module, what in ((self.state.network, "weights"), (self.state.ema.module, "averaged weights")):
            self.distributed.require_equal(weights_fingerprint(module.state_dict()), f"the {what}")
        rng = self.distributed.gather(capture_rng())
        if self.distributed.is_main:
            prefix = f"step_{self.state.step:08d}-"
            # What the sink accepted is gone from here by then; what failed half-way is cleared away.
            with tempfile.TemporaryDirectory(prefix=prefix, dir=self.workspace) as folder:
                directory = Path(folder) / "checkpoint"
                metadata = {
                    "stage": self.stage.name,
                    "stage_config": asdict(self.stage.config),
                    "lineage": dict(self.lineage),
                    "flops_per_sample": self.report.flops,
                }
                checkpoint.save(directory, self.state, metadata, rng)
                self.sink.save(directory, self.state.step)
        self.distributed.barrier()


@dataclass
class _Report:
    """Gathers what steps return, on the device; waits for it only when it is published."""

    stage: Stage
    distributed: Distributed
    last: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flops = 0.0
        """Floating-point operations of the first step, for each of its samples; 0: not counted."""
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self.distributed.device)
        self._begin()

    def _begin(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._samples, self._waited, self._started = 0, 0.0, time.perf_counter()

    def add(self, values: Mapping[str, Tensor], step: int, samples: int, waited: float) -> None:
        """Take in the result of step number ``step`` (from 1)."""
        finite = torch.stack([value.float() for value in values.values()]).isfinite().all()
        bad_now = ~finite & (self._first_bad < 0)
        self._first_bad = torch.where(bad_now, step, self._first_bad)
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        self._samples += samples
        self._waited += waited

    def require_finite(self) -> None:
        """Fail, on every rank, if any value of any rank was not finite.

        Raises:
            PermanentError: naming the step.
        """
        first_bad = int(self.distributed.maximum(self._first_bad).item())
        if first_bad >= 0:
            raise PermanentError(
                f"A loss was not finite at step {first_bad}.",
                "Go on from the last checkpoint with a lower learning rate, a gradient clip, or fp32.",
            )

    def publish(self, state: TrainState, log: MetricLog) -> None:
        """Means since the last report, health, speed; over all ranks."""
        self.require_finite()
        names = sorted(self._values)
        means = torch.stack([torch.stack(self._values[name]).float().mean() for name in names])
        values = dict(zip(names, self.distributed.mean(means).tolist(), strict=True))
        values |= self.stage.health(state)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        values["samples_per_second"] = self._samples / seconds
        values["data_wait_share"] = min(1.0, self._waited / seconds)
        values["samples_seen"] = float(state.samples_seen)
        values |= self._use(self._samples / seconds)
        if self.distributed.is_main:
            log.metrics(values, state.step)
        self.last = values
        self._begin()

    def _use(self, rate: float) -> dict[str, float]:
        """What of the machine is used at ``rate`` samples a second over all ranks; of this rank's memory."""
        device, values = self.distributed.device, {}
        if self.flops:
            values["tflops_per_second"] = self.flops * rate / 1e12
            peak = peak_flops(device)
            if peak is not None:
                values["mfu"] = self.flops * rate / (peak * self.distributed.world_size)
        resident = resident_gib()
        if resident is not None:
            values["host_memory_gib"] = resident
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return values


def weights_fingerprint(state: Mapping[str, Tensor]) -> int:
    """A number that changes with any bit of ``state``'s floating-point tensors; computed on the device."""
    sums = [
        (value.detach().reshape(-1).view(torch.int32).to(torch.int64) * (number + 1)).sum()
        for number, value in enumerate(state.values())
        if value.dtype == torch.float32
    ]
    return int(torch.stack(sums).sum().item())
