"""Ray as a scheduler: connect or start it, and run a bounded number of tasks at a time."""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from iqpir.errors import IncompleteError, UsageError
from pipeline.stopping import StoppedError

T = TypeVar("T")

log = logging.getLogger(__name__)

KNOCK_SECONDS = 10.0
NODE_SECONDS = 600.0
"""How long a cluster may take to get a node that is large enough."""
SYSTEM_RETRIES = 3
"""How often a task is started again after its worker or node died."""


def ensure_ray(num_cpus: int | None = None) -> None:
    """Connect to the cluster this process belongs to, or start a local one.

    Does nothing where Ray is initialised. A job that ``ray job submit`` started, and any process with
    ``RAY_ADDRESS``, connects (no runtime environment is passed: the job has one).

    Args:
        num_cpus: CPUs of a cluster that has to be started; all of this machine by default.

    Raises:
        UsageError: ``RAY_ADDRESS`` does not answer.
        IncompleteError: none can be started here.
        StoppedError: SIGTERM came meanwhile.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"ignore_reinit_error": True, "log_to_driver": False}
    with _own_signals():
        if address is None:
            _start_here(num_cpus=num_cpus, include_dashboard=False, **options)
        else:
            _connect(address, **options)


@contextmanager
def _own_signals() -> Iterator[None]:
    """``ray.init`` takes SIGTERM for itself, to exit at once: put back what this process does about it.

    Raises:
        StoppedError: the signal came in between.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as stopped:
        raise StoppedError("Stopped while Ray started.", "The same command starts again.") from stopped
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start_here(**options: Any) -> None:
    _own_token()
    with ExitStack() as stack:
        stack.push(_told)
        ray.init(address="local", **options)


def _told(kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> bool:
    """What a user is told when Ray does not start. Of a node that is slow to start Ray raises ``Exception`` itself."""
    if kind is Exception or isinstance(error, (OSError, ValueError, RuntimeError)):
        raise IncompleteError(
            f"Ray does not start on this machine: {error}.",
            "Look for a full disk, too little memory or too many processes; the same command starts again.",
        ) from error
    return False


def _connect(address: str, **options: Any) -> None:
    try:
        _knock(address)
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"No Ray cluster answers at RAY_ADDRESS={address}: {error}.",
            "Give host:port of the head (not the http:// address that ray job submit takes), or unset it.",
        ) from error


def _own_token() -> None:
    """A token for this process's own cluster alone, unless the environment names one.

    Ray would otherwise leave one in ~/.ray/auth_token; the next ``ray start`` then asks for it, and
    ``ray job submit``, which sends it only with RAY_AUTH_MODE=token, is turned away.
    """
    if not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _knock(address: str) -> None:
    """Open a connection to ``address``: Ray itself waits for a dead head for many minutes.

    Raises:
        ValueError: ``address`` is a web address.
        OSError: nothing listens there.
    """
    if address.startswith(("http://", "https://")):
        raise ValueError("a web address is for ray job submit only")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def run_on_ray(
    tasks: Iterable[T],
    work: Callable[[T], Any],
    *,
    window: int,
    options: dict[str, Any],
    stop: Callable[[], bool],
    grace: float,
) -> Iterator[tuple[T, Any, RayError | None]]:
    """Run ``work`` on each task on the cluster, at most ``window`` at a time.

    Args:
        tasks: small descriptors; consumed as the window moves.
        work: picklable; its results must be small, they travel to this process.
        window: tasks handed to Ray at a time; 0: as many as the cluster has CPUs for.
        options: for Ray, such as ``num_cpus`` and ``num_gpus`` of one task.
        stop: asked before each new task; True hands out no more.
        grace: seconds that running tasks have to end after a stop.

    Yields:
        task, result and None; or task, None and the error of Ray (a worker or node died too often).

    Raises:
        UsageError: no node can run such a task.
        Exception: what ``work`` raised: errors that are values must be values already.
    """
    remote: Any = ray.remote(_call).options(max_retries=SYSTEM_RETRIES, **options)
    shared = ray.put(work)
    width = window or slots(options, ray.cluster_resources()) + 2  # two are at hand when others end
    waiting: dict[Any, T] = {}
    source, deadline, room = iter(tasks), None, Room(options)
    while True:
        while len(waiting) < width and not stop():
            try:
                task = next(source)
            except StopIteration:
                break
            waiting[remote.remote(shared, task)] = task
        if not waiting:
            return
        if stop():
            deadline = deadline or time.monotonic() + grace
            if time.monotonic() > deadline:
                for reference in waiting:
                    ray.cancel(reference, force=True)
                return
        room.require()
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
        for reference in ready:
            yield _result(reference, waiting.pop(reference))


def slots(options: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many tasks or actors with these ``options`` a cluster with these ``resources`` can run at a time."""
    found = [resources.get("CPU", 1.0) / max(options.get("num_cpus", 1.0), 0.1)]
    if options.get("num_gpus"):
        found.append(resources.get("GPU", 0.0) / options["num_gpus"])
    return int(min(found))


class Room:
    """Whether any node of the cluster can run what is asked for: Ray itself would wait for one without end.

    Args:
        options: ``num_cpus`` and ``num_gpus`` of one task or actor.
    """

    def __init__(self, options: Mapping[str, float]) -> None:
        self._wanted = {"CPU": options.get("num_cpus", 1.0), "GPU": options.get("num_gpus", 0.0)}
        self._found, self._since = False, time.monotonic()
        # A cluster that others started may get nodes for what waits; one that this process started does not.
        self._patience = NODE_SECONDS if os.environ.get("RAY_ADDRESS") else 0.0
        self._warned = False

    def require(self) -> None:
        """Nothing, once a node has been seen that is large enough; call it while something waits for a place.

        Raises:
            UsageError: none came within ``NODE_SECONDS``.
        """
        if self._found:
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._found = any(all(node.get(name, 0.0) >= each for name, each in self._wanted.items()) for node in nodes)
        if self._found:
            return
        seen = ", ".join(sorted({_told_resources(node) for node in nodes}))
        text = f"No node has {_told_resources(self._wanted)} for one worker; the nodes have {seen}."
        if time.monotonic() - self._since >= self._patience:
            raise UsageError(text, "Ask for fewer (cpus and gpus of the scheduling), or add such a node.")
        if not self._warned:
            log.warning("%s Waiting %.0f s for one to come.", text, self._patience)
            self._warned = True


def _told_resources(values: Mapping[str, float]) -> str:
    return f"{values.get('CPU', 0.0):g} CPUs and {values.get('GPU', 0.0):g} GPUs"


def _call(work: Callable[[T], Any], task: T) -> Any:
    return work(task)


def _result(reference: Any, task: T) -> tuple[T, Any, RayError | None]:
    try:
        return task, ray.get(reference), None
    except RayTaskError:
        raise
    except RayError as error:
        return task, None, error
