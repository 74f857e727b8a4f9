"""Start a training function on one process, under torchrun, or on many nodes through Ray Train.

The training function is a plain function of a plain dictionary; Ray starts it and holds no truth: the
function itself finds its newest checkpoint, so all three launchers resume in the same way.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from iqpir.errors import UsageError
from pipeline.training.signs import Signs

Launcher = Literal["ray", "torchrun", "local"]
Train = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many training processes, and what each may use."""

    count: int = 1
    """Training workers."""
    min_count: int = 0
    """Fewest workers to go on with when nodes are lost (elastic); 0: exactly ``count``."""
    cpus: float = 1.0
    """CPUs of each worker."""
    gpus: Literal["auto", "yes", "no"] = "auto"
    """One GPU a worker: if the cluster has them, always, or never."""
    max_failures: int = 3
    """Restarts after real failures; preempted nodes do not count."""
    stop_seconds: float = 600.0
    """Seconds that workers of Ray get to write a checkpoint after the first SIGTERM or Ctrl-C."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.min_count <= self.count:
            raise UsageError(f"workers.count {self.count} with workers.min_count {self.min_count} is no range.")
        if self.stop_seconds < 0:
            raise UsageError(f"workers.stop_seconds {self.stop_seconds} is negative.")


def launch(train: Train, plan: dict[str, Any], launcher: Launcher, workers: Workers, name: str, signs: Signs) -> None:
    """Run ``train(plan)`` in every worker and wait. A stop of the job reaches them; they write a checkpoint and end.

    Args:
        train: what each worker runs; finds its rank through ``iqpir.training.distributed``.
        plan: JSON values.
        launcher: ``local`` (this process), ``torchrun`` (this process is one of many), ``ray``.
        workers: how many, for ``ray``.
        name: the run's name, for Ray's own records.
        signs: how workers of Ray hear of a stop.

    Raises:
        IqpirError: whatever the training function raised for a user.
        IncompleteError: workers died more often than ``workers.max_failures``; the same command goes on.
        StoppedError: the job was stopped, and the workers have not begun or do not end.
        PermanentError: the training function has a mistake.
    """
    if launcher == "ray":
        from pipeline.training.ray_launch import launch_on_ray  # Ray takes a second to import

        launch_on_ray(train, plan, workers, name, signs)
        return
    if launcher == "local" and workers.count > 1:
        raise UsageError(
            f"The launcher local is one process, workers.count is {workers.count}.",
            "Use --launcher ray, or torchrun.",
        )
    joined = launcher == "torchrun" and _join_process_group()
    try:
        train(plan)
    finally:
        if joined:
            torch.distributed.destroy_process_group()


def _join_process_group() -> bool:
    if "RANK" not in os.environ:
        raise UsageError(
            "The launcher torchrun needs RANK and WORLD_SIZE.",
            "Start with: torchrun --nproc-per-node N jobs/... --launcher torchrun.",
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True
