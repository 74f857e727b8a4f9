"""End this process at a numbered change of a folder store, as a power cut would: no ``finally`` runs.

A change is one call of ``Folder.put``, ``create`` or ``remove``, counted from 1, probes included. By hand::

    python -m tests.chaos.dies_at 5 written -- jobs/shard.py --input pictures --corpus corpus --workers 0
"""

import functools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.stores.folder import Folder

MOMENTS = ("begun", "written", "made")
"""Half of the bytes are written; all are, under a temporary name; the change is made and nobody was told."""


@dataclass
class DiesAt:
    """Sends itself a signal at one moment of one change. Call it in the process that shall die.

    Attributes:
        change: number of the change, from 1; one that is never reached does nothing.
        moment: one of ``MOMENTS``; a removal has none of the first two and is not made then.
        number: SIGKILL to die, SIGSTOP to wait for SIGCONT (not at ``begun``, which spoils the file).
        store: whose changes count. Of an object store a change is a request: ``begun`` is before it.
    """

    change: int
    moment: str
    number: int = signal.SIGKILL
    store: type[Any] = Folder
    counted: int = 0
    due: bool = False

    def __call__(self) -> None:
        for name in ("put", "create", "remove"):
            setattr(self.store, name, self._counting(getattr(self.store, name)))
        os.fsync = self._before(os.fsync, "begun")
        for name in ("link", "replace"):
            setattr(os, name, self._before(getattr(os, name), "written"))

    def _counting(self, change: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(change)
        def counted(*args: Any) -> None:
            self.counted += 1
            self.due = self.counted == self.change
            in_one = change.__name__ == "remove" or self.store is not Folder
            if self.due and in_one and self.moment != "made":
                self._end()
            try:
                change(*args)
            finally:
                if self.due and self.moment == "made":
                    self._end()
                self.due = False

        return counted

    def _before(self, call: Callable[..., Any], moment: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def waiting(*args: Any, **options: Any) -> Any:
            if self.due and self.moment == moment:
                if moment == "begun":
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                self._end()
            return call(*args, **options)

        return waiting

    def _end(self) -> None:
        self.due = False
        os.kill(os.getpid(), self.number)


if __name__ == "__main__":
    number, at, _, script, *arguments = sys.argv[1:]
    DiesAt(int(number), at)()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
