import dataclasses
import shutil
import signal
import uuid
from pathlib import Path

import pytest

from pipeline.corpus import Corpus
from pipeline.storage import Storage
from pipeline.stores.objects import S3Objects
from pipeline.verify import VerifyConfig, verify
from tests.chaos.conftest import Quiet, Sharding, draw, finish
from tests.chaos.dies_at import DiesAt
from tests.pipeline.corpus.conftest import Requests

PLANNED = DiesAt(5, "made", signal.SIGSTOP)
"""The plan is committed; no input has been read."""


def test_inputs_that_change_under_the_run_are_rows_now_and_samples_of_the_next_run(
    quiet: Quiet, sharding: Sharding, folder: Path
) -> None:
    source = Path(shutil.copytree(quiet.source, folder / "input"))
    corpus = Storage.open(str(folder / "corpus"))
    driver = sharding(source, corpus, prelude=PLANNED)
    driver.wait_until_stopped()
    shutil.copyfile(draw(folder / "other", 1, first=50) / "050.png", source / "000.png")
    (source / "001.png").write_bytes((source / "001.png").read_bytes()[:500])
    (source / "002.png").unlink()
    driver.resume()
    assert driver.end() == 0, driver.text()
    first = verify(VerifyConfig(corpus=corpus.url, workers=0))
    assert (first.inputs, first.samples) == (7, 3)
    statuses = Corpus(corpus).manifest().facts["statuses"]
    assert statuses == {"success": 3, "failed_input_changed": 2, "failed_missing": 1, "failed_truncated": 1}

    again = finish(source, corpus)
    assert (again.inputs, again.statuses) == (7, {"success": 4, "failed_missing": 1, "failed_truncated": 2})
    rows = Corpus(corpus).samples().to_pylist()
    assert {row["relpath"]: Corpus(corpus).read_sample(row) for row in rows} == {
        name: (source / name).read_bytes() for name in ("000.png", "003.png", "004.png", "005.png")
    }
    assert verify(VerifyConfig(corpus=corpus.url, workers=0)).orphans == 0


@pytest.mark.slow
def test_objects_that_change_under_the_run_are_rows_now_and_samples_of_the_next_run(
    quiet: Quiet, sharding: Sharding, s3: Requests, tmp_path: Path
) -> None:
    """Pictures in a prefix of a bucket, in folders, and the corpus in another one."""
    bucket = Storage.open(f"s3://pictures/{uuid.uuid4().hex}")
    source, corpus = bucket.child("input"), bucket.child("corpus")
    for path in quiet.source.iterdir():
        source.publish(f"a/b/{path.name}", path)
    driver = sharding(source.url, corpus, prelude=dataclasses.replace(PLANNED, store=S3Objects))
    driver.wait_until_stopped()
    source.publish("a/b/000.png", draw(tmp_path / "other", 1, first=50) / "050.png")
    source.publish("a/b/001.png", source.read("a/b/001.png")[:500])
    source.remove("a/b/002.png")
    driver.resume()
    assert driver.end() == 0, driver.text()
    first = verify(VerifyConfig(corpus=corpus.url, workers=0))
    assert (first.inputs, first.samples) == (7, 3)
    statuses = Corpus(corpus).manifest().facts["statuses"]
    assert statuses == {"success": 3, "failed_input_changed": 2, "failed_missing": 1, "failed_truncated": 1}

    again = finish(source.url, corpus)
    assert (again.inputs, again.statuses) == (7, {"success": 4, "failed_missing": 1, "failed_truncated": 2})
    rows = Corpus(corpus).samples().to_pylist()
    assert {row["relpath"]: Corpus(corpus).read_sample(row) for row in rows} == {
        name: source.read(name) for name in ("a/b/000.png", "a/b/003.png", "a/b/004.png", "a/b/005.png")
    }
