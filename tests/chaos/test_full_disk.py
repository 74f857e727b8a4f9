import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from iqpir.errors import IncompleteError
from pipeline.shard import ShardConfig
from pipeline.storage import Storage
from tests.chaos.conftest import Quiet, Sharding, settings
from tests.chaos.invariants import files, require_finished, require_whole
from tests.chaos.preludes import NOT_PERMITTED, FillAndGrow, SmallDisk, files_of_one_block
from tests.chaos.processes import start


def permitted(code: int) -> int:
    if code == NOT_PERMITTED:
        pytest.skip("mounting a tmpfs is not permitted here")
    return code


@pytest.mark.parametrize("size", ["8k", "24k", "44k", "72k"])
def test_a_full_disk_of_the_corpus_leaves_whole_objects_and_the_next_run_finishes(
    size: str, quiet: Quiet, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    config = settings(quiet.source, Storage.open(str(folder)))
    verb: Callable[[ShardConfig], None] = FillAndGrow(quiet.expected)
    job = start(verb, config, tmp_path / "errors", prelude=SmallDisk(folder, size))
    assert permitted(job.end()) == 0, job.text()


def test_a_full_scratch_disk_is_told_before_anything_is_read(quiet: Quiet, sharding: Sharding, tmp_path: Path) -> None:
    scratch, corpus = tmp_path / "scratch", Storage.open(str(tmp_path / "corpus"))
    scratch.mkdir()
    disk = SmallDisk(scratch, "16k")
    job = sharding(quiet.source, corpus, prelude=disk, environment={"TMPDIR": str(scratch)})
    assert permitted(job.end()) == IncompleteError.exit_code
    assert "16384 bytes free, a unit needs" in job.text() and "set TMPDIR" in job.text()
    assert not corpus.list("shards")


def test_files_that_may_not_grow_leave_nothing_half_written(quiet: Quiet, sharding: Sharding, tmp_path: Path) -> None:
    scratch, corpus = tmp_path / "scratch", Storage.open(str(tmp_path / "corpus"))
    scratch.mkdir()
    job = sharding(quiet.source, corpus, prelude=files_of_one_block, environment={"TMPDIR": str(scratch)})
    assert job.end() == IncompleteError.exit_code
    assert os.strerror(errno.EFBIG) in job.text() and "2 of 2 units of shard are not done" in job.text()
    require_whole(corpus)
    assert corpus.unfinished() == [] and list(scratch.iterdir()) == []
    assert {path.split("/")[0] for path in files(corpus)} == {"_plan"}
    assert sharding(quiet.source, corpus).end() == 0
    require_finished(corpus, quiet.expected)
