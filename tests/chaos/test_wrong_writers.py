"""The harness finds writers that break the protocol: without that, its silence would prove nothing."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from iqpir.errors import VerificationError
from pipeline.storage import Storage
from tests.chaos import wrong_writers
from tests.chaos.campaign import kill_at_every_change
from tests.chaos.conftest import Quiet, Sharding, finish
from tests.chaos.dies_at import DiesAt
from tests.chaos.invariants import files, require_finished, require_grown
from tests.chaos.preludes import Both


@pytest.mark.parametrize(
    ("sabotage", "moment", "found"),
    [
        (wrong_writers.stream_to_the_final_name, "begun", "is not whole"),
        (wrong_writers.commit_before_the_payload, "made", "which is not there"),
    ],
)
def test_a_writer_that_breaks_the_order_is_found_at_its_death(
    sabotage: Callable[[], None], moment: str, found: str, quiet: Quiet, sharding: Sharding, folder: Path
) -> None:
    with pytest.raises(AssertionError, match=found):
        kill_at_every_change(quiet, sharding, folder, moment, sabotage=sabotage)


def test_a_writer_that_overwrites_records_is_found_by_two_drivers(
    quiet: Quiet, sharding: Sharding, folder: Path
) -> None:
    source = Path(shutil.copytree(quiet.source, folder / "input"))
    corpus = Storage.open(str(folder / "corpus"))
    pause = DiesAt(8, "written", signal.SIGSTOP)
    late = sharding(source, corpus, prelude=Both(wrong_writers.overwrite_records, pause))
    late.wait_until_stopped()
    (source / "000.png").unlink()
    finish(source, corpus)
    sealed = files(corpus)
    late.resume()
    late.end()
    with pytest.raises(AssertionError, match="is not what it was"):
        require_grown(sealed, files(corpus))


def test_a_seal_that_leaves_a_unit_out_is_found(quiet: Quiet, sharding: Sharding, folder: Path) -> None:
    corpus = Storage.open(str(folder / "corpus"))
    sharding(quiet.source, corpus, prelude=wrong_writers.forget_a_sample).end()
    with pytest.raises((AssertionError, VerificationError)):
        require_finished(corpus, quiet.expected)
