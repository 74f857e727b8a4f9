"""Kill a driver at every change it makes to a folder, one run each, and see that the next driver finishes."""

import signal
from collections.abc import Callable
from pathlib import Path

from pipeline.storage import Storage
from tests.chaos.conftest import Quiet, Sharding, finish
from tests.chaos.dies_at import DiesAt
from tests.chaos.invariants import files, require_finished, require_grown, require_whole
from tests.chaos.preludes import Both


def kill_at_every_change(
    quiet: Quiet,
    sharding: Sharding,
    folder: Path,
    moment: str,
    *,
    prepare: Callable[[Path], None] = lambda _: None,
    sabotage: Callable[[], None] | None = None,
) -> int:
    """Round n ends a driver at its n-th change; the last round is the one that nothing ended.

    Args:
        quiet: inputs, and the corpus that has to come out.
        sharding: starts drivers.
        folder: for the corpora.
        moment: of the change.
        prepare: puts an earlier state of the corpus into a folder.
        sabotage: called in the driver's process: makes it a wrong writer.

    Returns:
        How many changes a run makes.
    """
    change, ended = 0, -signal.SIGKILL
    while ended:
        change += 1
        corpus = Storage.open(str(folder / f"corpus-{change}"))
        prepare(folder / f"corpus-{change}")
        death = DiesAt(change, moment)
        ended = sharding(quiet.source, corpus, prelude=Both(sabotage, death) if sabotage else death).end()
        assert ended in (0, -signal.SIGKILL)
        left = require_whole(corpus)
        finish(quiet.source, corpus)
        require_grown(left, files(corpus))
        require_finished(corpus, quiet.expected)
    return change - 1
