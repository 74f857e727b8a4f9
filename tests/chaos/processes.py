"""Jobs in processes of their own that start in milliseconds: forked from one that has imported everything."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from iqpir.errors import IqpirError

IMPORTED = [
    "pandas",
    "s3fs",
    "pytest",
    "pipeline.shard",
    "pipeline.score",
    "pipeline.verify",
    "pipeline.gc",
    "tests.chaos.warm",
    "tests.chaos.preludes",
]
SECONDS = 60.0

Prelude = Callable[[], None]


@dataclass(frozen=True)
class Job:
    """A running job."""

    process: ForkServerProcess
    errors: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid or 0)

    def end(self) -> int:
        """Its exit code; minus the signal's number where one ended it."""
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode

    def text(self) -> str:
        """What it wrote to stderr."""
        return self.errors.read_text()

    def wait_until_stopped(self) -> None:
        """Until it has sent itself SIGSTOP."""
        deadline = time.monotonic() + SECONDS
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.005)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def start(
    verb: Callable[[Any], Any],
    config: Any,
    errors: Path,
    *,
    prelude: Prelude | None = None,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Start ``verb(config)`` in a process of its own; it ends with the exit code that its script would have.

    Args:
        verb: such as ``shard``.
        config: for it.
        errors: file for its stderr.
        prelude: called in that process first: fails, limits or sabotages it.
        environment: more variables for it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    inherited = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "RAY_"))}
    process = context.Process(target=_run, args=(verb, config, errors, prelude, {**inherited, **(environment or {})}))
    process.start()
    return Job(process, errors)


def _run(
    verb: Callable[[Any], Any],
    config: Any,
    errors: Path,
    prelude: Prelude | None,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(environment)
    tempfile.tempdir = None
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if prelude is not None:
        prelude()
    try:
        verb(config)
    except IqpirError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
