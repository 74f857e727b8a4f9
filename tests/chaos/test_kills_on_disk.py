import shutil
import signal
from pathlib import Path

import pytest

from pipeline.layout import manifest_path
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify
from tests.chaos.campaign import kill_at_every_change
from tests.chaos.conftest import Quiet, Sharding, draw, finish
from tests.chaos.dies_at import MOMENTS, DiesAt
from tests.chaos.invariants import files, require_finished, require_whole

CHANGES = 5 + 2 * 3 + 4
"""Plan and its probe, two units, seal: what docs/reliability.md numbers."""
CLAIM = CHANGES - 3
"""The seal claims its version."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_that_dies_at_any_change_leaves_what_the_next_one_finishes(
    moment: str, quiet: Quiet, sharding: Sharding, folder: Path
) -> None:
    assert kill_at_every_change(quiet, sharding, folder, moment) == CHANGES


def test_a_driver_that_dies_while_it_appends_leaves_the_former_seal_true(
    quiet: Quiet, sharding: Sharding, folder: Path
) -> None:
    source = Path(shutil.copytree(quiet.source, folder / "input"))
    first = Storage.open(str(folder / "first"))
    finish(source, first)
    draw(source, 2, first=6)
    whole = Storage.open(str(shutil.copytree(folder / "first", folder / "whole")))
    assert finish(source, whole).version == 2

    def sealed_once(corpus: Path) -> None:
        shutil.copytree(folder / "first", corpus)

    appended = Quiet(source, files(whole))
    assert kill_at_every_change(appended, sharding, folder, "made", prepare=sealed_once) == 5 + 3 + 4


def test_a_driver_that_dies_again_and_again_gets_there(quiet: Quiet, sharding: Sharding, folder: Path) -> None:
    corpus = Storage.open(str(folder / "corpus"))
    codes = [sharding(quiet.source, corpus, prelude=DiesAt(5, "written")).end()]
    while codes[-1]:
        require_whole(corpus)
        codes.append(sharding(quiet.source, corpus, prelude=DiesAt(4 + len(codes) % 3, "made")).end())
    assert codes.count(-signal.SIGKILL) == len(codes) - 1 > 2
    require_finished(corpus, quiet.expected)


def test_a_claim_that_was_never_sealed_harms_no_later_seal(quiet: Quiet, sharding: Sharding, folder: Path) -> None:
    """The driver that claimed version 1 died, and before the next one came there were more inputs."""
    source = Path(shutil.copytree(quiet.source, folder / "input"))
    corpus = Storage.open(str(folder / "corpus"))
    assert sharding(source, corpus, prelude=DiesAt(CLAIM, "made")).end() == -signal.SIGKILL
    assert corpus.exists(manifest_path(1, "json")) and not corpus.exists(manifest_path(1, "parquet"))
    draw(source, 1, first=6)
    assert finish(source, corpus).version == 2
    assert verify(VerifyConfig(corpus=corpus.url, workers=0)).samples == 7
    require_finished(corpus, files(corpus))
