"""A pool of Ray actors that grows while tasks wait and gives actors back that have nothing to do.

An actor keeps what its work has loaded (a metric's weights, a CUDA context) from task to task; Ray may end the
process of a plain task after any of them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from iqpir.errors import IncompleteError
from pipeline.cluster import SYSTEM_RETRIES, Room, slots
from pipeline.commits.units import LostWorkerError

T = TypeVar("T")

STARTS = 5
"""Actors in a row that die before they are ready, until the pool gives up."""
_POLL_SECONDS = 1.0


@dataclass
class _Job(Generic[T]):
    """A task and how many actors have died at it."""

    task: T
    deaths: int = 0


class _Actor:
    """Holds the work, and through it whatever the work loads."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def ready(self) -> None:
        """Returns once the process is up."""

    def call(self, task: Any) -> Any:
        return self._work(task)


def run_on_actors(
    tasks: Iterable[T],
    work: Callable[[T], Any],
    *,
    least: int,
    most: int,
    idle_seconds: float,
    options: dict[str, Any],
    stop: Callable[[], bool],
    grace: float,
) -> Iterator[tuple[T, Any, RayError | None]]:
    """Run ``work`` on each task in actors, ``least`` to ``most`` of them; as ``pipeline.cluster.run_on_ray``.

    Args:
        tasks: small descriptors; consumed as actors come free.
        work: picklable, sent to each actor once; its results must be small.
        least: actors that are started at once. When all are up and tasks still wait, as many again are started; 0: all
            at once.
        most: actors at a time; 0: as many as the cluster has room for.
        idle_seconds: an actor without a task for so long is ended.
        options: for Ray, such as ``num_cpus`` and ``num_gpus`` (parts are allowed) of one actor.
        stop: asked before each new task; True hands out no more.
        grace: seconds that running tasks have to end after a stop.

    Yields:
        task, result and None; or task, None and the error of Ray (its actors died too often).

    Raises:
        UsageError: no node can run such an actor.
        IncompleteError: actors die before they are ready.
        Exception: what ``work`` raised: errors that are values must be values already. ``LostWorkerError`` counts
            as the death of its actor.
    """
    # What ``run_on_ray`` keeps over what it may start at once is for tasks that wait; an actor would hold its place.
    pool = _Pool[T](work, most or max(1, slots(options, ray.cluster_resources())), options)
    queue: deque[_Job[T]] = deque()
    source, left = iter(tasks), True
    deadline: float | None = None
    try:
        while True:
            while left and not stop() and len(queue) < pool.most:
                try:
                    queue.append(_Job(next(source)))
                except StopIteration:
                    left = False
            if stop():
                queue.clear()
                left = False
                deadline = deadline or time.monotonic() + grace
                if time.monotonic() > deadline:
                    return
            pool.grow(least, len(queue))
            pool.hand_out(queue)
            if not queue and not pool.running and not left:
                return
            if not queue and not left:
                pool.shrink(idle_seconds)
            yield from pool.finished(queue)
    finally:
        pool.end()


class _Pool(Generic[T]):
    """The actors of one run, by what they do: starting, idle or running a task."""

    def __init__(self, work: Callable[[T], Any], most: int, options: dict[str, Any]) -> None:
        self.most = most
        self._class: Any = ray.remote(_Actor).options(**options)
        self._work = ray.put(work)
        self._starting: dict[Any, Any] = {}
        self._idle: list[tuple[Any, float]] = []
        self.running: dict[Any, tuple[Any, _Job[T]]] = {}
        self._failed_starts = 0
        self._room = Room(options)

    @property
    def actors(self) -> int:
        """How many there are, those that start included."""
        return len(self._starting) + len(self._idle) + len(self.running)

    def grow(self, least: int, waiting: int) -> None:
        """Start actors for tasks that wait: ``least`` at first, as many again when all are up; 0: all at once.

        A short job stays small that way, and loads its weights in few places.
        """
        useful = min(self.most, len(self.running) + waiting)
        if least:
            useful = min(useful, self.actors if self._starting else max(least, 2 * self.actors))
        while self.actors < useful:
            actor = self._class.remote(self._work)
            self._starting[actor.ready.remote()] = actor

    def hand_out(self, queue: deque[_Job[T]]) -> None:
        """Give waiting tasks to idle actors, to the one that worked last first: the others may go."""
        while queue and self._idle:
            actor, _ = self._idle.pop()
            job = queue.popleft()
            self.running[actor.call.remote(job.task)] = (actor, job)

    def shrink(self, idle_seconds: float) -> None:
        """No task waits: end actors that still start, and those that have been idle for long."""
        for actor in self._starting.values():
            ray.kill(actor)
        self._starting.clear()
        now = time.monotonic()
        for actor, since in self._idle:
            if now - since >= idle_seconds:
                ray.kill(actor)
        self._idle = [item for item in self._idle if now - item[1] < idle_seconds]

    def finished(self, queue: deque[_Job[T]]) -> Iterator[tuple[T, Any, RayError | None]]:
        """Wait a little and yield what is done; a task whose actor died goes back into the queue."""
        if self._starting and not self._idle and not self.running:
            self._room.require()
        ready, _ = ray.wait([*self._starting, *self.running], num_returns=1, timeout=_POLL_SECONDS)
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
                continue
            actor, job = self.running.pop(reference)
            try:
                result = ray.get(reference)
            except RayError as error:
                ray.kill(actor)
                if isinstance(error, RayTaskError) and not isinstance(error.cause, LostWorkerError):
                    raise
                job.deaths += 1
                if job.deaths > SYSTEM_RETRIES:
                    yield job.task, None, error
                else:
                    queue.appendleft(job)
            else:
                self._idle.append((actor, time.monotonic()))
                yield job.task, result, None

    def end(self) -> None:
        """End every actor."""
        for actor in (*self._starting.values(), *(actor for actor, _ in self._idle)):
            ray.kill(actor)
        for actor, _ in self.running.values():
            ray.kill(actor)

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                line = " ".join(str(error).split())[:300]
                raise IncompleteError(
                    f"{STARTS} actors in a row died before they were ready: {line}.", "See Ray's logs; run again."
                ) from error
            return
        self._failed_starts = 0
        self._idle.append((actor, time.monotonic()))
