"""What the driver and the workers of Ray leave for each other in the run's folder, the one place that both know.

``progress.json``, from the first worker: its step, and what it said. ``stop.json``, from the driver: end now.
Each names the start that it is of, so that what an earlier start left behind means nothing.
"""

import json
import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.layout import to_json
from pipeline.storage import Storage

log = logging.getLogger(__name__)
PROGRESS = "progress.json"
STOP = "stop.json"
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """How far the first worker is."""

    worker: str
    """Which process it is, of those that Ray started one after the other: random."""
    step: int
    """Steps done, those before a resume included."""
    said: list[tuple[int, str]]
    """Level and text of what it logged, from the first on."""


@dataclass(frozen=True)
class Signs:
    """The signs of one start of a run; travels to workers as ``storage.url`` and ``start``."""

    storage: Storage
    """The run's folder."""
    start: str = field(default_factory=lambda: secrets.token_hex(8))
    """Which start of the run: random."""

    def show(self, progress: Progress) -> None:
        """Leave how far the first worker is; a store that fails costs the training nothing."""
        try:
            self.storage.publish(PROGRESS, to_json({"start": self.start, **asdict(progress)}))
        except OSError as error:
            log.warning("cannot say that step %d is done: %s", progress.step, error)

    def progress(self) -> Progress | None:
        """What the first worker last showed, or None: it has not begun."""
        found = self._found(PROGRESS)
        if found is None:
            return None
        return Progress(found["worker"], found["step"], [(level, text) for level, text in found["said"]])

    def ask_to_stop(self) -> None:
        """Tell the workers to write a checkpoint and end."""
        self.storage.publish(STOP, to_json({"start": self.start}))

    @contextmanager
    def stop_asked(self) -> Iterator[threading.Event]:
        """An event that is set soon after ``ask_to_stop``, until the block ends."""
        asked, ended = threading.Event(), threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK_SECONDS):
                if self._found(STOP) is not None:
                    asked.set()
                    return

        thread = threading.Thread(target=look, name="iqpir-stop", daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            ended.set()
            thread.join()

    def _found(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self.storage.read(name))
        except OSError:  # absent, or the store is away: the next look tells
            return None
        return found if found.get("start") == self.start else None
