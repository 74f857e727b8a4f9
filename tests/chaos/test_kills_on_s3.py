import signal
import uuid
from pathlib import Path

import boto3
import pytest

from pipeline.storage import Storage
from tests.chaos.conftest import Sharding, draw, finish
from tests.chaos.fault_proxy import FaultProxy, Request
from tests.chaos.invariants import Files, files, require_finished, require_whole
from tests.chaos.preludes import PART, small_parts

CHANGES = 5 + 3 + 4
"""Plan and its probe, one unit, seal."""


def bucket() -> Storage:
    return Storage.open(f"s3://pictures/{uuid.uuid4().hex}")


@pytest.mark.slow
def test_a_driver_that_dies_at_any_request_leaves_what_the_next_one_finishes(
    tmp_path: Path, sharding: Sharding, proxy: FaultProxy
) -> None:
    """Round n ends a driver when the store has done its n-th change, and amid the request of three of them."""
    source, undisturbed = draw(tmp_path / "input", 3), Storage.open(str(tmp_path / "corpus"))
    finish(source, undisturbed)
    deaths = [("kill_made", number) for number in range(1, CHANGES + 2)]
    deaths += [("kill_begun", number) for number in (CHANGES - 6, CHANGES - 5, CHANGES - 4)]
    codes = []
    for fault, change in deaths:
        corpus = bucket()
        proxy.reset(lambda request, due=(fault, change): due[0] if request.number == due[1] else None)
        job = sharding(source, corpus)
        proxy.victim = job.pid
        codes.append(job.end())
        proxy.reset()
        require_whole(corpus)
        finish(source, corpus)
        require_finished(corpus, files(undisturbed))
    assert codes.pop(CHANGES) == 0, "nothing ended that round"
    assert set(codes) == {-signal.SIGKILL}


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, Files]:
    """Pictures of 11 MB in one unit, and their corpus."""
    source, corpus = draw(tmp_path / "large", 3, side=1100), Storage.open(str(tmp_path / "corpus"))
    finish(source, corpus)
    return source, files(corpus)


def test_an_upload_of_parts_that_a_death_cut_is_seen_by_gc(
    large: tuple[Path, Files], sharding: Sharding, proxy: FaultProxy
) -> None:
    source, expected = large
    corpus = bucket()
    proxy.reset(lambda request: "kill_begun" if "partNumber=2" in request.path else None)
    job = sharding(source, corpus, prelude=small_parts)
    proxy.victim = job.pid
    assert job.end() == -signal.SIGKILL, job.text()
    proxy.reset()
    assert not corpus.list("shards") and not corpus.list("_commits")
    finish(source, corpus)
    assert require_finished(corpus, expected).unfinished == 1
    prefix = corpus.url.removeprefix("s3://pictures/")
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="pictures", Prefix=prefix)


@pytest.mark.parametrize(
    ("lost", "dangling"), [("partNumber=2", 0), ("uploadId=", 0), ("uploads", 1)], ids=["part", "completion", "start"]
)
def test_an_upload_of_parts_survives_lost_replies(
    lost: str, dangling: int, large: tuple[Path, Files], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start whose reply is lost leaves an upload that only the server knows: gc ends it."""
    source, expected = large
    corpus = bucket()
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: PART)
    once: list[Request] = []

    def fault(request: Request) -> str | None:
        parts = lost != "uploadId=" or request.method == "POST"
        if not once and parts and lost in request.path and request.number:
            once.append(request)
            return "lost"
        return None

    proxy.reset(fault)
    finish(source, corpus)
    assert once
    assert require_finished(corpus, expected).unfinished == dangling
