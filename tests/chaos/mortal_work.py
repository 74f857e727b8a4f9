"""Work on units whose workers or nodes die: importable by the workers of a cluster."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from pipeline.commits.plan import ShardUnit
from pipeline.scoring.score_unit import ScoreTask, UnitScorer
from pipeline.sharding.shard_unit import ShardWork
from pipeline.stores.folder import Folder
from tests.chaos.dies_at import DiesAt


@dataclass(frozen=True, kw_only=True)
class MortalWork(ShardWork):
    """``ShardWork`` whose process dies the first time that it is given certain units.

    Attributes:
        deaths: ordinal of a unit -> change and moment at which its first attempt dies; the changes of a unit
            are 1 its shard, 2 its table, 3 its record.
        graves: folder with a file for each death.
        store: kind of store whose changes count.
        environment: for the worker: a cluster that runs already has no address of a store that is started later.
    """

    deaths: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    graves: str = ""
    store: type[Any] = Folder
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, unit: ShardUnit) -> dict[str, Any]:
        os.environ.update(self.environment)
        grave = Path(self.graves) / f"{unit.ordinal}"
        if unit.ordinal in self.deaths and not grave.exists():
            grave.touch()
            DiesAt(*self.deaths[unit.ordinal], store=self.store)()
        return super().__call__(unit)


@dataclass(frozen=True, kw_only=True)
class WatchedWork(ShardWork):
    """``ShardWork`` that takes half a second longer and leaves a file for each attempt.

    Attributes:
        attempts: folder for files ``<ordinal>-<node>-<process>``.
    """

    attempts: str = ""

    def __call__(self, unit: ShardUnit) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        (Path(self.attempts) / f"{unit.ordinal}-{node}-{os.getpid()}").touch()
        time.sleep(0.5)
        return super().__call__(unit)


@dataclass(frozen=True)
class MortalScorer(UnitScorer):
    """``UnitScorer`` whose process dies the first time that it is given certain units.

    Attributes:
        deaths: ordinal of a unit -> change and moment at which its first attempt dies; the changes of a unit
            are for each metric its table and its record.
        graves: folder with a file for each death.
    """

    deaths: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    graves: str = ""

    def __call__(self, task: ScoreTask) -> dict[str, dict[str, int]]:
        grave = Path(self.graves) / f"{task.ordinal}"
        if task.ordinal in self.deaths and not grave.exists():
            grave.touch()
            DiesAt(*self.deaths[task.ordinal])()
        return super().__call__(task)
