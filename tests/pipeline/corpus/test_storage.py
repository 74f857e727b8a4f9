import os
import pickle
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from iqpir.errors import UsageError
from pipeline.storage import Storage


def test_what_is_published_is_read_whole_and_in_parts(store: Storage) -> None:
    store.publish("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.read_range("a/b.bin", 8, 4) == b"89"
    assert store.stat("a/b.bin").size == 10
    assert store.exists("a/b.bin") and not store.exists("a") and not store.exists("a/c")


def test_publish_takes_files_and_replaces(store: Storage, tmp_path: Path) -> None:
    file = tmp_path / "payload"
    file.write_bytes(b"x" * 100_000)
    store.publish("p", file)
    store.publish("p", b"second")
    assert store.read("p") == b"second"


def test_what_is_published_can_be_downloaded(store: Storage, tmp_path: Path) -> None:
    store.publish("a", b"0123456789abcdef" * 4096)
    store.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789abcdef" * 4096


@pytest.mark.slow
def test_a_large_object_goes_up_in_parts_and_leaves_none_open(s3: Any, tmp_path: Path) -> None:
    file = tmp_path / "payload"
    with file.open("wb") as sparse:
        sparse.truncate(101 << 20)
        sparse.write(b"begin")
    storage = Storage.open("s3://pictures/large")
    storage.publish("object", file)
    assert any("object" in path for path in s3.puts)
    assert storage.stat("object").size == 101 << 20 and "-" in storage.stat("object").etag
    assert storage.read_range("object", 0, 5) == b"begin"
    assert storage.unfinished() == []


def test_create_keeps_the_first_content_and_tells_it(store: Storage) -> None:
    assert store.conditional
    assert store.create("record.json", b"first") == b"first"
    assert store.create("record.json", b"second") == b"first"
    assert store.read("record.json") == b"first"


def test_of_many_creators_one_wins_and_all_know_it(store: Storage) -> None:
    if store.url.startswith("memory"):
        pytest.skip("fsspec's memory is no store for threads")
    assert store.conditional
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(store.create("record", str(n).encode()))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {store.read("record")} and len(answers) == 8


def test_listings_are_sorted_relative_and_of_one_folder_only(store: Storage) -> None:
    for path in ("b/2", "b/1", "bc/3", "a"):
        store.publish(path, b"x")
    assert [entry.path for entry in store.list()] == ["a", "b/1", "b/2", "bc/3"]
    assert [entry.path for entry in store.list("b")] == ["b/1", "b/2"]
    assert store.list("nothing") == []
    assert [entry.path for entry in store.child("b").list()] == ["1", "2"]


def test_an_etag_changes_with_the_content(store: Storage) -> None:
    store.publish("a", b"one")
    before = store.list()[0]
    assert store.stat("a").etag == before.etag
    time.sleep(0.01)
    store.publish("a", b"two")
    assert store.list()[0].etag != before.etag


def test_removing_twice_is_no_error(store: Storage) -> None:
    store.publish("a", b"x")
    store.remove("a")
    store.remove("a")
    assert store.list() == []


def test_a_storage_travels_with_what_its_probe_found(store: Storage) -> None:
    store.publish("a", b"x")
    found = store.conditional
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("a") == b"x" and copy.__dict__["_conditional"] is found


def test_the_probe_leaves_nothing(store: Storage) -> None:
    assert store.conditional
    assert store.list() == []
    folder = store.local("_probe")
    assert folder is None or not folder.exists()


def test_paths_cannot_leave_the_storage(store: Storage) -> None:
    with pytest.raises(ValueError, match="leaves"):
        store.read("../secret")


def test_a_failed_write_shows_nothing_under_the_final_name(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "store"))
    with pytest.raises(FileNotFoundError):
        storage.publish("final", tmp_path / "absent")
    assert storage.list() == [] and storage.unfinished() == []


def test_temporary_files_of_a_crash_are_hidden_but_found(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    storage.publish("shards/a.tar", b"x")
    (tmp_path / "shards" / ".b.tar.0a1b2c.tmp").write_bytes(b"half")
    assert [entry.path for entry in storage.list()] == ["shards/a.tar"]
    (left,) = storage.unfinished()
    storage.discard(left)
    assert storage.unfinished() == []


def test_a_listing_in_pages_is_whole(s3: Any) -> None:
    """A page has a thousand keys; the objects are put into the server from within, for requests would take long."""
    names = [f"{number:04d}" for number in range(2_345)]
    for name in names:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("pictures", f"pages/{name}", b"x")
    listings = len(s3.listings)
    assert [entry.path for entry in Storage.open("s3://pictures/pages").list()] == names
    assert len(s3.listings) - listings == 1 + 3, "one to see whether the bucket answers, and three pages"


def test_open_uploads_of_a_crash_are_hidden_but_found(s3: Any) -> None:
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket="pictures", Key="crashed/shards/a.tar")
    storage = Storage.open("s3://pictures/crashed")
    assert storage.list() == []
    (left,) = storage.unfinished()
    assert left.path == "shards/a.tar"
    storage.discard(left)
    assert storage.unfinished() == []


def test_a_store_that_ignores_conditions_is_found_out(s3: Any) -> None:
    s3.deaf = True
    storage = Storage.open("s3://pictures/deaf")
    assert not storage.conditional
    assert storage.create("record", b"first") == b"first"
    assert storage.create("record", b"second") == b"first"


def test_a_missing_bucket_is_a_usage_error(s3: Any) -> None:
    with pytest.raises(UsageError, match=r"Cannot reach s3://nowhere/x.*AWS_ENDPOINT_URL"):
        Storage.open("s3://nowhere/x")


@pytest.mark.slow
def test_an_endpoint_that_refuses_is_a_usage_error_in_seconds(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UsageError, match="Cannot reach"):
        Storage.open("s3://pictures/x")
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_an_endpoint_that_never_answers_is_a_usage_error_in_seconds(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(UsageError, match="no answer within"):
            Storage.open("s3://pictures/x")
        assert time.monotonic() - began < 20


def test_an_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Cannot open what://"):
        Storage.open("what://bucket/x")


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder with a picture, and one in a folder that this process may not read, be it root's or not."""
    with tempfile.TemporaryDirectory(prefix="iqpir-locked-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.png").write_bytes(b"a")
        (folder / "inner").mkdir()
        (folder / "inner" / "b.png").write_bytes(b"b")
        (folder / "inner").chmod(0o000)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65_534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            (folder / "inner").chmod(0o755)


def test_a_folder_that_may_not_be_read_is_an_error_and_not_an_empty_one(locked: Path) -> None:
    with pytest.raises(PermissionError, match="inner"):
        Storage.open(str(locked)).list()
    assert Storage.open(str(locked / "none")).list() == []
    assert Storage.open(str(locked / "a.png")).list() == []
