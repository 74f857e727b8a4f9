"""How far a job is, on stderr: one bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0

log = logging.getLogger(__name__)


class Meter(Protocol):
    """What a job tells its progress to."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more are done; ``note`` replaces the text behind the bar."""


@contextmanager
def progress(total: int, description: str) -> Iterator[Meter]:
    """Show ``description`` and how many of ``total`` are done, until the block ends."""
    if not sys.stderr.isatty():
        lines = _Lines(total, description)
        yield lines
        lines.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Bar(bars, bars.add_task(description, total=total, note=""))


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self.bars, self.task = bars, task

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move the bar."""
        self.bars.update(self.task, advance=count, note=note)


class _Lines:
    def __init__(self, total: int, description: str) -> None:
        self.total, self.description, self.done, self.note = total, description, 0, ""
        self.began = self.spoken = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Write a line if the last one is old enough."""
        self.done, self.note = self.done + count, note or self.note
        if time.monotonic() - self.spoken >= LINE_SECONDS:
            self._speak()

    def finish(self) -> None:
        """Write the last line, if there was one before."""
        if self.spoken > self.began:
            self._speak()

    def _speak(self) -> None:
        self.spoken = time.monotonic()
        rate = self.done / max(self.spoken - self.began, 1e-9)
        log.info("%s: %d of %d, %.3g/s %s", self.description, self.done, self.total, rate, self.note)
