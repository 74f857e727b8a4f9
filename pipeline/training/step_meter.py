"""Show how far a training is and what it says, wherever its steps are taken.

A worker of Ray has no terminal: it leaves both in the run's folder (``Signs``), and the driver looks there.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from iqpir.training.distributed import Distributed
from pipeline.heard import heard
from pipeline.progress import progress
from pipeline.training.config import Training
from pipeline.training.signs import Progress, Signs

log = logging.getLogger(__name__)
_POLL_SECONDS = 3.0


@contextmanager
def step_meter(training: Training, distributed: Distributed, signs: Signs) -> Iterator[Callable[[int, int], None]]:
    """Progress by step number, on rank 0 alone; a worker of Ray leaves it where the driver looks."""
    if not distributed.is_main:
        yield lambda step, steps: None
    elif training.launcher == "ray":
        with _left_for_the_driver(signs) as leave:
            yield leave
    else:
        with _meter(training) as show:
            yield show


@contextmanager
def _left_for_the_driver(signs: Signs) -> Iterator[Callable[[int, int], None]]:
    worker, spoken, last = secrets.token_hex(4), 0.0, 0
    with heard() as said:

        def leave(step: int, steps: int) -> None:
            nonlocal spoken, last
            last = step
            if step == steps or time.monotonic() - spoken > _POLL_SECONDS:
                spoken = time.monotonic()
                signs.show(Progress(worker, step, said))

        try:
            yield leave
        finally:
            signs.show(Progress(worker, last, said))


@contextmanager
def watching(training: Training, signs: Signs) -> Iterator[None]:
    """In the driver: show how far the workers of Ray are and what the first says; its output stays on its node."""
    if training.launcher != "ray":
        yield
        return
    ended = threading.Event()
    with _meter(training) as show:
        look = _Look(training, signs, show)
        thread = threading.Thread(target=look.until, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            look()


class _Look:
    """Shows what is new since the last look."""

    def __init__(self, training: Training, signs: Signs, show: Callable[[int, int], None]) -> None:
        self.training, self.signs, self.show = training, signs, show
        self.worker, self.told = "", 0

    def until(self, ended: threading.Event) -> None:
        """Look every few seconds."""
        while not ended.wait(_POLL_SECONDS):
            self()

    def __call__(self) -> None:
        found = self.signs.progress()
        if found is None:
            return
        if found.worker != self.worker:
            self.worker, self.told = found.worker, 0
        for level, text in found.said[self.told :]:
            log.log(level, "first worker: %s", text)
        self.told = len(found.said)
        if found.step:
            self.show(found.step, self.training.steps)


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
