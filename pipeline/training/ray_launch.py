"""Start a training on many nodes: Ray Train gathers workers and replaces dead ones; it keeps no checkpoint of its own.

Ray's own thread waits for the workers, so that this process's is free for signals (Ray Train would take Ctrl-C to
abort them).
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from iqpir.errors import IncompleteError, IqpirError, PermanentError
from pipeline.cluster import ensure_ray
from pipeline.stopping import StoppedError, stopping
from pipeline.training.launch import Train, Workers
from pipeline.training.signs import Signs

_START_TIMEOUT_S = 1800
_COLLECTIVE_TIMEOUT_S = 1800
_LOOK_SECONDS = 0.5
_GOES_ON = "The same command goes on from the newest checkpoint."
_MISTAKES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(NotImplementedError, TypeError, ValueError),
)
"""What a worker raises when the program is wrong: the same again at each start."""


def launch_on_ray(train: Train, plan: dict[str, Any], workers: Workers, name: str, signs: Signs) -> None:
    """Run ``train(plan)`` in the workers of a cluster; see ``pipeline.training.launch.launch``."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    with stopping("the workers write a checkpoint; the same command goes on from there") as stop:
        ensure_ray(num_cpus=max(int(workers.count * workers.cpus) + 1, os.cpu_count() or 1))
        if stop.is_set():
            raise StoppedError(f"Training {name} was stopped while Ray started.", _GOES_ON)
        trainer = _trainer(train, plan, workers, name)
        try:
            _fit(trainer.fit, stop, workers.stop_seconds, name, signs)
        except (TrainingFailedError, RayError) as error:
            raise cause_of(error, name) from error


def _trainer(train: Train, plan: dict[str, Any], workers: Workers, name: str) -> TorchTrainer:
    """Gang-scheduled workers, restarts with a bound."""
    use_gpu = workers.gpus == "yes" or (workers.gpus == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return TorchTrainer(
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


def _fit(fit: Callable[[], Any], stop: threading.Event, stop_seconds: float, name: str, signs: Signs) -> None:
    """Wait for ``fit`` in a thread of its own; after a stop, ask the workers to end and give them some time.

    Raises:
        StoppedError: no worker had begun, or they did not end in time.
        BaseException: what ``fit`` raises.
    """
    with ThreadPoolExecutor(1, "iqpir-ray") as pool:
        running = pool.submit(fit)
        try:
            while not running.done():
                wait([running], timeout=_LOOK_SECONDS)
                if stop.is_set():
                    _end(running, stop_seconds, name, signs)
        finally:
            if not running.done():
                ray.shutdown()  # the run's actors end with their driver, and so does the thread
    running.result()


def _end(running: "Future[Any]", stop_seconds: float, name: str, signs: Signs) -> None:
    signs.ask_to_stop()
    if signs.progress() is None:
        raise StoppedError(f"Training {name} was stopped before its first step.", _GOES_ON)
    if wait([running], timeout=stop_seconds).not_done:
        raise StoppedError(
            f"The workers of {name} did not end within {stop_seconds:g} seconds of the stop.",
            f"{_GOES_ON} Give them more with --workers.stop_seconds.",
        )


def cause_of(error: BaseException, name: str) -> IqpirError:
    """The user's error behind Ray's; else whether the same command may go on, with the error's last line."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    causes = [cause for failure in [*failures, error] for cause in _chain(failure)]
    for cause in causes:
        if isinstance(cause, IqpirError):
            return cause
    lines = str(failures[0] if failures else error).strip().splitlines()
    what = f"Training {name} failed: {lines[-1] if lines else type(error).__name__}"
    logs = "The workers' logs (ray job logs, or the session's folder) hold the traceback"
    if any(isinstance(getattr(failure, "_base_exc", failure), _MISTAKES) for failure in failures):
        return PermanentError(what, f"{logs}; it is a mistake of the program.")
    return IncompleteError(what, f"{_GOES_ON} {logs}; --workers.max_failures allows more restarts.")


def _chain(failure: BaseException) -> list[BaseException]:
    """An error and what it was raised from, through Ray Train's wrappers."""
    chain: list[BaseException] = []
    cause: BaseException | None = failure
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or getattr(cause, "_base_exc", None)
    return chain
