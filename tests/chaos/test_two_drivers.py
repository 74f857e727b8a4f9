import os
import shutil
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.corpus import Corpus
from pipeline.gc import GcConfig, gc
from pipeline.storage import Storage
from pipeline.stores.objects import S3Objects
from pipeline.verify import VerifyConfig, verify
from tests.chaos.conftest import Quiet, Sharding, draw, finish
from tests.chaos.dies_at import DiesAt
from tests.chaos.invariants import files, require_finished, require_grown, require_whole
from tests.chaos.processes import Job, start
from tests.pipeline.corpus.conftest import Requests

BEFORE_ITS_RECORD = DiesAt(8, "written", signal.SIGSTOP)
"""The payload of the first unit is stored; its record is not."""
DAYS = 48 * 3600.0


@dataclass(frozen=True)
class Paused:
    """A driver that is stopped before its first commit, and its corpus."""

    job: Job
    corpus: Storage
    source: Path

    def go_on(self) -> int:
        self.job.resume()
        return self.job.end()


@pytest.fixture
def paused(quiet: Quiet, sharding: Sharding, folder: Path) -> Paused:
    source = Path(shutil.copytree(quiet.source, folder / "input"))
    corpus = Storage.open(str(folder / "corpus"))
    job = sharding(source, corpus, prelude=BEFORE_ITS_RECORD)
    job.wait_until_stopped()
    assert not corpus.list("_commits") and len(corpus.list("shards")) == 1
    return Paused(job, corpus, source)


def age(corpus: Storage) -> None:
    """Make every payload two days old."""
    for entry in (*corpus.list("shards"), *corpus.list("samples")):
        os.utime(corpus.uri(entry.path), (time.time() - DAYS, time.time() - DAYS))


def test_two_drivers_at_once_make_one_corpus(quiet: Quiet, sharding: Sharding, folder: Path) -> None:
    for number in range(4):
        corpus = Storage.open(str(folder / f"corpus-{number}"))
        jobs = [sharding(quiet.source, corpus) for _ in range(3)]
        assert [job.end() for job in jobs] == [0, 0, 0], [job.text() for job in jobs]
        require_finished(corpus, quiet.expected)


def test_a_driver_that_wakes_up_late_adopts_what_was_committed_meanwhile(paused: Paused) -> None:
    """A picture has vanished since it stored its payload: the two attempts differ, the first record counts."""
    (paused.source / "000.png").unlink()
    result = finish(paused.source, paused.corpus)
    assert result.statuses["failed_missing"] == 1
    sealed = files(paused.corpus)
    assert paused.go_on() == 0
    require_grown(sealed, files(paused.corpus))
    expected = {path: data for path, data in files(paused.corpus).items() if path in _named(paused.corpus)}
    removed = require_finished(paused.corpus, expected)
    assert removed.orphans == 2, "its shard and its table"
    assert verify(VerifyConfig(corpus=paused.corpus.url, workers=0)).manifest == result.manifest


def _named(corpus: Storage) -> set[str]:
    units = Corpus(corpus).manifest().units
    named = {ref.path for unit in units for ref in unit.objects}
    return named | {entry.path for entry in corpus.list() if not entry.path.startswith(("shards/", "samples/"))}


@pytest.mark.slow
def test_drivers_on_s3_share_the_work_and_a_late_one_adopts_what_was_committed(
    quiet: Quiet, sharding: Sharding, s3: Requests, tmp_path: Path
) -> None:
    shared, late = (Storage.open(f"s3://pictures/{uuid.uuid4().hex}") for _ in range(2))
    jobs = [sharding(quiet.source, shared) for _ in range(2)]
    assert [job.end() for job in jobs] == [0, 0], [job.text() for job in jobs]
    require_finished(shared, quiet.expected)

    source = Path(shutil.copytree(quiet.source, tmp_path / "input"))
    job = sharding(source, late, prelude=DiesAt(8, "begun", signal.SIGSTOP, S3Objects))
    job.wait_until_stopped()
    assert not late.list("_commits") and len(late.list("shards")) == 1
    (source / "000.png").unlink()
    result = finish(source, late)
    assert result.statuses["failed_missing"] == 1
    sealed = files(late)
    job.resume()
    assert job.end() == 0, job.text()
    require_grown(sealed, files(late))
    expected = {path: data for path, data in files(late).items() if path in _named(late)}
    assert require_finished(late, expected).orphans == 2, "its shard and its table"
    assert verify(VerifyConfig(corpus=late.url, workers=0)).manifest == result.manifest


def test_a_driver_that_wakes_up_late_takes_no_later_seal_back(paused: Paused) -> None:
    draw(paused.source, 3, first=6)
    result = finish(paused.source, paused.corpus)
    assert result.samples == 9
    pointer = paused.corpus.read("_SUCCESS")
    assert paused.go_on() == 0
    assert paused.corpus.read("_SUCCESS") == pointer
    assert verify(VerifyConfig(corpus=paused.corpus.url, workers=0)).samples == 9


def test_many_drivers_may_probe_one_folder_at_once(folder: Path) -> None:
    """Each removes the folder of its probe when it is done, and another may just have made it."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: Storage.open(str(folder / "corpus")).conditional, range(300)))
    assert all(answers)


def test_two_collections_can_be_added_at_once(quiet: Quiet, sharding: Sharding, folder: Path) -> None:
    other = draw(folder / "other", 5, first=20)
    for number in range(4):
        corpus = Storage.open(str(folder / f"corpus-{number}"))
        jobs = [sharding(quiet.source, corpus), sharding(other, corpus, collection="other")]
        assert [job.end() for job in jobs] == [0, 0], [job.text() for job in jobs]
        assert verify(VerifyConfig(corpus=corpus.url, workers=0)).pending_units == 0
        assert Corpus(corpus).samples(["key"]).num_rows == 11


def test_gc_leaves_what_a_driver_is_about_to_commit(paused: Paused, folder: Path) -> None:
    found = gc(GcConfig(corpus=paused.corpus.url, dry_run=False))
    assert (found.removed, found.young) == (0, 3), "a shard, a table and the record that is being written"
    assert paused.go_on() == 0
    undisturbed = Storage.open(str(folder / "undisturbed"))
    finish(paused.source, undisturbed)
    assert require_finished(paused.corpus, files(undisturbed)).orphans == 0


def test_gc_leaves_an_old_orphan_that_a_driver_has_stored_again(paused: Paused, sharding: Sharding) -> None:
    paused.job.process.kill()
    assert paused.job.end() == -signal.SIGKILL
    age(paused.corpus)
    again = sharding(paused.source, paused.corpus, prelude=DiesAt(6, "written", signal.SIGSTOP))
    again.wait_until_stopped()
    assert not paused.corpus.list("_commits")
    assert gc(GcConfig(corpus=paused.corpus.url)).orphans == 0
    again.resume()
    assert again.end() == 0
    require_whole(paused.corpus)


def test_gc_looks_at_each_orphan_again_before_it_goes(paused: Paused, tmp_path: Path) -> None:
    """While gc removes a first orphan, a driver stores two others again and commits them."""
    paused.job.process.kill()
    paused.job.end()
    unrelated = "samples/000000-000000000000.parquet"
    paused.corpus.publish(unrelated, b"x")
    age(paused.corpus)
    config = GcConfig(corpus=paused.corpus.url, dry_run=False)
    collecting = start(gc, config, tmp_path / "gc", prelude=DiesAt(1, "begun", signal.SIGSTOP))
    collecting.wait_until_stopped()
    finish(paused.source, paused.corpus)
    collecting.resume()
    assert collecting.end() == 0, collecting.text()
    assert not paused.corpus.exists(unrelated)
    require_whole(paused.corpus)
