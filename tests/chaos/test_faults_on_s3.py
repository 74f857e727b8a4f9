import random
import uuid
from pathlib import Path

import pytest
from botocore.retries.standard import ExponentialBackoff

from pipeline.commits.records import commit, finished
from pipeline.storage import Storage
from pipeline.stores import objects
from pipeline.verify import VerifyConfig, verify
from tests.chaos.conftest import Quiet, finish
from tests.chaos.fault_proxy import Fault, FaultProxy
from tests.chaos.invariants import require_finished

Environment = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def impatience(monkeypatch: Environment) -> None:
    """Waits of the client are cut short: how often it tries stays as it is."""
    monkeypatch.setitem(objects.S3_OPTIONS["config_kwargs"], "read_timeout", 0.6)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)


def bucket() -> Storage:
    return Storage.open(f"s3://pictures/{uuid.uuid4().hex}")


@pytest.mark.parametrize("kind", ["slow_down", "silent", "cut_request", "cut_reply", "lost"])
def test_a_network_that_fails_at_every_eighth_request_changes_no_byte(
    kind: Fault, quiet: Quiet, proxy: FaultProxy
) -> None:
    corpus = bucket()
    chance = random.Random(2603)
    proxy.reset(lambda _: kind if chance.random() < 1 / 8 else None)
    finish(quiet.source, corpus)
    assert verify(VerifyConfig(corpus=corpus.url, workers=0)).samples == 6
    assert proxy.faults >= 5
    proxy.reset()
    require_finished(corpus, quiet.expected)


def test_a_writer_whose_replies_are_lost_knows_its_own_record(proxy: FaultProxy) -> None:
    storage = bucket()
    assert storage.conditional
    replies = iter(["lost"] * 2)
    proxy.reset(lambda request: next(replies, None) if request.conditional else None)
    assert storage.create("record", b"ours") == b"ours"
    assert proxy.faults == 2
    proxy.reset(lambda request: "lost" if request.conditional else None)
    assert storage.create("another", b"ours") == b"ours"
    assert storage.create("another", b"theirs") == b"ours"


def test_a_loser_whose_reply_is_lost_takes_the_winners_record(proxy: FaultProxy) -> None:
    storage = bucket()
    assert commit(storage, "s", "f", "u", {"value": 1})["value"] == 1
    proxy.reset(lambda request: "lost" if request.conditional else None)
    assert commit(storage, "s", "f", "u", {"value": 2})["value"] == 1


def test_a_store_that_is_down_is_an_os_error_and_no_bug(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: Environment
) -> None:
    monkeypatch.setattr(objects, "S3_RETRIES", 1)
    storage = bucket()
    storage.publish("object", b"0123456789" * 1000)
    for kind in ("slow_down", "cut_request", "cut_reply", "lost"):
        proxy.reset(lambda _, kind=kind: kind)
        with pytest.raises(OSError):
            storage.read("object")
        with pytest.raises(OSError):
            storage.download("object", tmp_path / "copy")
        if kind != "cut_reply":  # that to a PUT has no body
            with pytest.raises(OSError):
                storage.publish("other", b"x")


@pytest.mark.parametrize("deaf_from", [0, 5], ids=["at the start", "behind the plan"])
def test_a_store_that_ignores_conditions_is_found_by_the_probe(
    deaf_from: int, quiet: Quiet, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets a record an attempt; a store that turns deaf later than the probe cannot be told from a sound one."""
    proxy.reset(lambda request: "deaf" if request.conditional and request.number > deaf_from else None)
    corpus = bucket()
    result = finish(quiet.source, corpus)
    attempts = [entry.path for entry in corpus.list("_commits") if len(entry.path.split("/")) == 5]
    assert (len(attempts) == result.units) is (deaf_from == 0)
    assert ("ignores conditional writes" in caplog.text) is (deaf_from == 0)
    assert corpus.read("_manifest/v000001.parquet") == quiet.expected["_manifest/v000001.parquet"]


def test_attempts_that_differ_on_such_a_store_make_one_corpus(quiet: Quiet, proxy: FaultProxy) -> None:
    """Two drivers that saw different inputs both leave a record; one counts, and verify knows which."""
    proxy.reset(lambda request: "deaf" if request.conditional else None)
    corpus = bucket()
    assert finish(quiet.source, corpus).samples == 6
    fingerprint = corpus.list("_commits/shard")[0].path.split("/")[2]
    records = finished(corpus, "shard", fingerprint)
    for unit_id, record in records.load(records).items():
        commit(corpus, "shard", fingerprint, unit_id, {**record, "samples": 0, "objects": record["objects"][-1:]})
    assert len(corpus.list("_commits")) == 2 * len(records)
    again = finish(quiet.source, corpus)
    assert verify(VerifyConfig(corpus=corpus.url, workers=0)).samples == again.samples == 6
