"""Start a training function on one process, under torchrun, or on many nodes through Ray Train.

The training function is a plain function of a plain dictionary; Ray starts it and holds no truth: the
function itself finds its newest checkpoint, so all three launchers resume in the same way.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from iqpir.errors import IqpirError, PermanentError, UsageError

Launcher = Literal["ray", "torchrun", "local"]
Train = Callable[[dict[str, Any]], None]
_START_TIMEOUT_S = 1800
_COLLECTIVE_TIMEOUT_S = 1800


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

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.min_count <= self.count:
            raise UsageError(f"workers.count {self.count} with workers.min_count {self.min_count} is no range.")


def launch(train: Train, plan: dict[str, Any], launcher: Launcher, workers: Workers, name: str) -> None:
    """Run ``train(plan)`` in every worker and wait.

    Args:
        train: what each worker runs; finds its rank through ``iqpir.training.distributed``.
        plan: JSON values.
        launcher: ``local`` (this process), ``torchrun`` (this process is one of many), ``ray``.
        workers: how many, for ``ray``.
        name: the run's name, for Ray's own records.

    Raises:
        IqpirError: whatever the training function raised for a user.
        PermanentError: workers failed more often than ``workers.max_failures``.
    """
    if launcher == "ray":
        _launch_ray(train, plan, workers, name)
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


def _launch_ray(train: Train, plan: dict[str, Any], workers: Workers, name: str) -> None:
    """Ray Train V2: gang-scheduled workers, restarts with a bound, no checkpoint of Ray's own."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.cluster import ensure_ray

    ensure_ray(num_cpus=max(int(workers.count * workers.cpus) + 1, os.cpu_count() or 1))
    use_gpu = workers.gpus == "yes" or (workers.gpus == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    trainer = TorchTrainer(
        train,
        train_loop_config=plan,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            # Train V2 takes a range; the annotations that a type checker sees are those of V1.
            num_workers=(workers.min_count, workers.count) if workers.min_count else workers.count,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=plan["ray_storage"],
            # Train V2 has the second limit; the annotations that a type checker sees are those of V1.
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=20),  # type: ignore[call-arg]
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error, name) from error


def _cause(error: BaseException, name: str) -> IqpirError:
    """The user's error behind Ray's, or a PermanentError with its first line."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in [*failures.values(), error]:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, IqpirError):
                return cause
            cause = cause.__cause__ or getattr(cause, "_base_exc", None)
    first = next(iter(failures.values()), error)
    text = str(first).strip().splitlines()
    return PermanentError(
        f"Training {name} failed: {text[-1] if text else type(first).__name__}",
        "The workers' logs (ray job logs, or the session's folder) hold the traceback; the same command resumes.",
    )
