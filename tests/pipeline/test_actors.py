"""Actors keep what they have loaded, come while tasks wait, go when none does, and may die."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from iqpir.errors import UsageError
from pipeline.cluster import run_on_ray, slots
from pipeline.commits.actors import _Pool, run_on_actors
from pipeline.commits.units import LostWorkerError

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Task:
    """What a test wants done."""

    name: str
    seconds: float = 0.0
    deaths: int = 0
    losses: int = 0
    watches: bool = False


@dataclass(frozen=True)
class Work:
    """Loads once a process (as a metric does), then works; picklable."""

    folder: Path

    def __call__(self, task: Task) -> dict[str, Any]:
        loaded = self.folder / f"loaded-{os.getpid()}"
        if not loaded.exists():
            loaded.touch()
        attempts = self.folder / f"attempts-{task.name}"
        with attempts.open("a") as file:
            file.write("x")
        if attempts.stat().st_size <= task.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if attempts.stat().st_size <= task.losses:
            raise LostWorkerError("The device of this process is lost.")
        time.sleep(task.seconds)
        return {"name": task.name, "pid": os.getpid(), "alone": task.watches and _becomes_alone()}


def _becomes_alone(patience: float = 90.0) -> bool:
    """Whether this actor first has company and then, while it works, is the only one left."""
    deadline, company = time.monotonic() + patience, False
    while time.monotonic() < deadline:
        free = ray.available_resources().get("CPU", 0.0)
        company = company or free <= ray.cluster_resources()["CPU"] - 2
        if company and free == ray.cluster_resources()["CPU"] - 1:
            return True
        time.sleep(0.05)
    return False


def _run(folder: Path, tasks: Iterable[Task], **changed: Any) -> list[tuple[Task, Any, Any]]:
    options: dict[str, Any] = {"least": 0, "most": 2, "idle_seconds": 0.2, "grace": 5.0, "stop": lambda: False}
    options |= {"options": {"num_cpus": 1.0}, **changed}
    return list(run_on_actors(tasks, Work(folder), **options))


def test_many_tasks_share_what_few_actors_have_loaded(tmp_path: Path, local_ray: None) -> None:
    done = _run(tmp_path, [Task(str(number), 0.3) for number in range(12)])
    assert sorted(result["name"] for _, result, _ in done) == sorted(str(number) for number in range(12))
    assert {error for _, _, error in done} == {None}
    assert len(list(tmp_path.glob("loaded-*"))) == len({result["pid"] for _, result, _ in done}) == 2


def test_one_task_needs_one_actor_and_none_needs_none(tmp_path: Path, local_ray: None) -> None:
    assert _run(tmp_path, []) == []
    assert len(_run(tmp_path, [Task("only")], most=4)) == 1
    assert len(list(tmp_path.glob("loaded-*"))) == 1


def test_a_pool_begins_small_and_doubles_when_all_are_up_and_tasks_wait(tmp_path: Path, local_ray: None) -> None:
    pool = _Pool[Task](Work(tmp_path), 3, {"num_cpus": 1.0})
    queue: deque[Any] = deque()
    sizes = []
    try:
        for least, waiting in ((1, 0), (1, 9), (1, 9)):
            pool.grow(least, waiting)
            sizes.append(pool.actors)
        for _ in range(2):
            while pool._starting:
                list(pool.finished(queue))
            pool.grow(1, 9)
            sizes.append(pool.actors)
    finally:
        pool.end()
    assert sizes == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("arrives", [False, True], ids=["own cluster", "a cluster that may grow"])
@pytest.mark.parametrize("actors", [False, True], ids=["tasks", "actors"])
def test_what_no_node_can_run_is_said_and_not_waited_for(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch, actors: bool, arrives: bool
) -> None:
    if arrives:
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setattr("pipeline.cluster.NODE_SECONDS", 1.5)
    began = time.monotonic()
    options: dict[str, Any] = {"options": {"num_cpus": 1.0, "num_gpus": 0.25}, "stop": lambda: False, "grace": 1.0}
    with pytest.raises(UsageError, match=r"No node has 1 CPUs and 0\.25 GPUs .* have 4 CPUs and 0 GPUs"):
        if actors:
            _run(tmp_path, [Task("never")], **options)
        else:
            list(run_on_ray([Task("never")], Work(tmp_path), window=1, **options))
    assert (time.monotonic() - began >= 1.5) is arrives


def test_parts_of_a_gpu_make_room_for_several() -> None:
    assert slots({"num_cpus": 1.0, "num_gpus": 0.25}, {"CPU": 16.0, "GPU": 1.0}) == 4
    assert slots({"num_cpus": 6.0, "num_gpus": 0.25}, {"CPU": 16.0, "GPU": 1.0}) == 2
    assert slots({"num_cpus": 0.5}, {"CPU": 4.0}) == 8


def test_idle_actors_give_their_places_back_while_others_still_work(tmp_path: Path, local_ray: None) -> None:
    tasks = [Task("long", watches=True), *(Task(str(number), 0.5) for number in range(6))]
    done = _run(tmp_path, tasks, most=3)
    long = next(result for task, result, _ in done if task.name == "long")
    assert long["alone"]
    assert len({result["pid"] for _, result, _ in done}) > 1


def test_a_task_whose_actor_died_is_done_by_another_and_one_that_kills_each_is_an_error(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.commits.actors.SYSTEM_RETRIES", 1)
    done = _run(tmp_path, [Task("once", deaths=1), Task("always", deaths=99), Task("lost", losses=1), Task("well")])
    found = {task.name: (result, error) for task, result, error in done}
    assert found["once"][1] is None and found["well"][1] is None
    assert found["lost"][1] is None and (tmp_path / "attempts-lost").stat().st_size == 2
    assert found["always"][0] is None and isinstance(found["always"][1], ray.exceptions.RayError)
    assert (tmp_path / "attempts-always").stat().st_size == 2


def test_a_stop_ends_after_the_running_tasks(tmp_path: Path, local_ray: None) -> None:
    seen: list[str] = []
    tasks = (Task(str(number), 0.3) for number in range(40))
    for task, _, _ in run_on_actors(
        tasks, Work(tmp_path), least=1, most=2, idle_seconds=1, options={"num_cpus": 1.0},
        stop=lambda: len(seen) >= 3, grace=30.0,
    ):  # fmt: skip
        seen.append(task.name)
    assert 3 <= len(seen) <= 5
