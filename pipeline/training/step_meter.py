"""Show how far a training is, wherever its steps are taken.

A worker of Ray has no terminal: it leaves its step in the run's folder, and the driver looks there.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from iqpir.training.distributed import Distributed
from pipeline.layout import to_json
from pipeline.progress import progress
from pipeline.storage import Storage
from pipeline.training.config import Training

PROGRESS = "progress.json"
_POLL_SECONDS = 3.0


@contextmanager
def step_meter(training: Training, distributed: Distributed) -> Iterator[Callable[[int, int], None]]:
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
def watching(training: Training, storage: Storage) -> Iterator[None]:
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
