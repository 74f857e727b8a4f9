"""Run pieces of planned work, in this process or on Ray, and commit each once (``pipeline.commits.records``).

Ray schedules and remembers nothing: start again anywhere, one listing of the records says what is left.
"""

import itertools
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from iqpir.errors import IncompleteError, IqpirError, PermanentError, UsageError
from pipeline.commits.records import Finished, commit, finished
from pipeline.heard import heard
from pipeline.progress import progress
from pipeline.stopping import stopping
from pipeline.storage import Storage

log = logging.getLogger(__name__)


class Unit(Protocol):
    """What can be scheduled: small, picklable, with an identity (``ManifestUnit`` is one)."""

    @property
    def unit_id(self) -> str:
        """Covers everything that decides the result."""

    @property
    def ordinal(self) -> int:
        """Number of the unit, for people."""


class LostWorkerError(IncompleteError):
    """This process can do no further work, whatever the unit: only a new one can, such as another actor of a pool."""


T = TypeVar("T")
R = TypeVar("R")
U = TypeVar("U", bound=Unit)


@dataclass(frozen=True, kw_only=True)
class SchedulingConfig:
    """How units are run."""

    workers: int = 1
    """Units worked on at a time. 1: in this process, or on all of the cluster that RAY_ADDRESS names;
    0: in this process even then; more: that many on Ray, which is started here unless RAY_ADDRESS is set."""
    cpus: float = 1.0
    """CPUs that Ray sets aside for a unit."""
    gpus: float = 0.0
    """GPUs that Ray sets aside for a unit; parts are allowed."""
    attempts: int = 3
    """Attempts at a unit when the storage fails; a dead worker or node is retried by Ray besides."""
    grace: float = 30.0
    """Seconds that running units get to end after the first SIGTERM or Ctrl-C."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.attempts < 1 or self.cpus < 0 or self.gpus < 0 or self.grace < 0:
            raise UsageError(
                f"workers {self.workers}, attempts {self.attempts}, cpus {self.cpus}, gpus {self.gpus}, "
                f"grace {self.grace}: none may be negative, attempts is at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """Run tasks in actors, which keep what they have loaded, ``SchedulingConfig.workers`` of them at most."""

    least: int
    """Actors that are started at once; more follow while units wait. 0: all that may be at once."""
    idle_seconds: float
    """An actor without a task for so long is ended."""


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What became of a piece of work: a value, or an error with its kind."""

    value: R | None = None
    error: str = ""
    kind: Literal["", "transient", "permanent"] = ""
    attempts: int = 1
    said: tuple[tuple[int, str], ...] = ()
    """Level and text of the warnings that it logged where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A unit without a commit record, and why."""

    unit_id: str
    ordinal: int
    kind: Literal["", "transient", "permanent"]
    error: str


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run of units did."""

    total: int
    skipped: int
    """Units that had a commit record before."""
    done: int
    """Units committed now."""
    failures: tuple[Failure, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """Whether every unit has its commit record."""
        return self.skipped + self.done == self.total

    def require_complete(self, step: str) -> None:
        """Nothing, if every unit is committed.

        Raises:
            PermanentError: a unit can never succeed.
            IncompleteError: units are left.
        """
        if self.complete:
            return
        for failure in self.failures:
            log.error("unit %06d (%s): %s", failure.ordinal, failure.kind, failure.error)
        left = self.total - self.skipped - self.done
        message = f"{left} of {self.total} units of {step} are not done."
        if self.failures:
            message += f" First: unit {self.failures[0].ordinal:06d}, {self.failures[0].error.rstrip('.')}."
        if any(failure.kind == "permanent" for failure in self.failures):
            raise PermanentError(message)
        raise IncompleteError(message, "The same command goes on where this one stopped.")


def run_units(
    storage: Storage,
    step: str,
    fingerprint: str,
    units: Iterable[U],
    work: Callable[[U], Mapping[str, Any]],
    *,
    total: int,
    scheduling: SchedulingConfig | None = None,
    known: Finished | None = None,
) -> RunReport:
    """Do every unit that has no commit record, and commit each as it is done.

    Args:
        storage: the corpus.
        step: such as ``shard`` or ``score/niqe``; also names the progress bar.
        fingerprint: of the configuration.
        units: consumed as the work proceeds; those with a record are skipped.
        work: picklable; stores the payload of a unit and returns its commit record. ``OSError`` is retried,
            ``IqpirError`` fails the unit for good, anything else is a bug and ends the run.
        total: how many units there are.
        scheduling: where and how many at a time.
        known: the records, if they have been listed already.
    """
    done = finished(storage, step, fingerprint) if known is None else known
    skipped = 0

    def pending() -> Iterator[U]:
        nonlocal skipped
        for unit in units:
            if unit.unit_id in done:
                skipped += 1
            else:
                yield unit

    left = pending()
    first = next(left, None)
    if first is None:
        return RunReport(total=total, skipped=skipped, done=0)
    if not storage.conditional:  # probed here, once, and not when there is nothing to write
        log.warning("%s ignores conditional writes: records are kept per attempt", storage.url)
    committing = _Committing(storage, step, fingerprint, work)
    committed, failures = 0, []
    remaining = itertools.chain([first], left)
    with closing(schedule(remaining, committing, total - skipped, step, scheduling)) as outcomes:
        for unit, outcome in outcomes:
            if outcome.kind:
                failures.append(
                    Failure(unit_id=unit.unit_id, ordinal=unit.ordinal, kind=outcome.kind, error=outcome.error)
                )
            else:
                committed += 1
    return RunReport(total=total, skipped=skipped, done=committed, failures=tuple(failures))


@dataclass(frozen=True)
class _Committing(Generic[U]):
    """Work on a unit, then its commit record."""

    storage: Storage
    step: str
    fingerprint: str
    work: Callable[[U], Mapping[str, Any]]

    def __call__(self, unit: U) -> None:
        commit(self.storage, self.step, self.fingerprint, unit.unit_id, self.work(unit))


def schedule(
    tasks: Iterable[T],
    work: Callable[[T], R],
    total: int,
    description: str,
    scheduling: SchedulingConfig | None = None,
    actors: ActorPool | None = None,
) -> Generator[tuple[T, Outcome[R]], None, None]:
    """Run ``work`` on each task and yield what became of it, in the order of completion. Commits nothing.

    On Ray each task is one of Ray's, or with ``actors`` a call of an actor from a pool that grows and shrinks. An
    actor whose work raises ``LostWorkerError`` is replaced; elsewhere that ends the run.
    After the first SIGTERM or Ctrl-C no task is handed out any more; running ones end within the grace.
    """
    config = scheduling or SchedulingConfig()
    patient = _Patient(work, config.attempts)
    told: set[str] = set()
    with progress(total, description) as meter, stopping("running units may end, no new ones are started") as stop:
        if not uses_ray(config.workers):
            for task in tasks:
                yield task, patient(task)
                meter.advance()
                if stop.is_set():
                    return
            return
        from pipeline.cluster import ensure_ray, run_on_ray  # Ray takes a second to import

        ensure_ray(config.workers if config.workers > 1 else None)
        patient = replace(patient, afar=True)
        window = config.workers if config.workers > 1 else 0
        options = {"num_cpus": config.cpus, "num_gpus": config.gpus}
        if actors is None:
            done = run_on_ray(tasks, patient, window=window, options=options, stop=stop.is_set, grace=config.grace)
        else:
            from pipeline.commits.actors import run_on_actors

            done = run_on_actors(
                tasks,
                patient,
                least=actors.least,
                most=window,
                idle_seconds=actors.idle_seconds,
                options=options,
                stop=stop.is_set,
                grace=config.grace,
            )
        for task, outcome, error in done:
            _tell(() if outcome is None else outcome.said, told)
            yield task, outcome if error is None else Outcome(error=_line(error), kind="transient")
            meter.advance()


def _tell(said: Iterable[tuple[int, str]], told: set[str]) -> None:
    """Show what workers said; what many say, once."""
    for level, text in said:
        if text not in told:
            told.add(text)
            log.log(level, "worker: %s", text)


def uses_ray(workers: int) -> bool:
    """Whether ``SchedulingConfig.workers`` means Ray in this process."""
    if workers == 0:
        return False
    ray = sys.modules.get("ray")
    return workers > 1 or bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


@dataclass(frozen=True)
class _Patient(Generic[T, R]):
    """Work that is tried again when the storage fails, and whose errors are values."""

    work: Callable[[T], R]
    attempts: int
    afar: bool = False
    """In a process of Ray, whose log nobody reads: warnings come with the outcome."""

    def __call__(self, task: T) -> Outcome[R]:
        if not self.afar:
            return self._done(task)
        with heard(logging.WARNING) as said:
            outcome = self._done(task)
        return replace(outcome, said=tuple(said))

    def _done(self, task: T) -> Outcome[R]:
        error: OSError = OSError()
        for attempt in range(1, self.attempts + 1):
            try:
                return Outcome(self.work(task), attempts=attempt)
            except LostWorkerError:
                raise
            except IqpirError as permanent:
                return Outcome(error=str(permanent), kind="permanent", attempts=attempt)
            except OSError as transient:
                error = transient
                if attempt < self.attempts:
                    time.sleep(random.uniform(0.2, 1.0) * 2**attempt)
        return Outcome(error=_line(error), kind="transient", attempts=self.attempts)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
