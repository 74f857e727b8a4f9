"""Copies of remote shards: fetched once, proved, bounded; and an order that needs few of them at a time."""

import os
import uuid
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from iqpir.config import preset
from iqpir.errors import UsageError, VerificationError
from pipeline.corpus import Corpus
from pipeline.shard import ShardConfig, shard
from pipeline.training.feed import FeedConfig, IndexedFeed, Samples
from pipeline.training.shard_cache import ShardCache
from tests.conftest import draw_picture

SHARDS, EACH = 5, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of five shards that lies in no folder."""
    source = tmp_path_factory.mktemp("pictures")
    for seed in range(SHARDS * EACH):
        Image.fromarray(draw_picture(seed, 32)).save(source / f"{seed:02d}.png")
    url = f"memory://{uuid.uuid4().hex}/corpus"
    shard(ShardConfig(input=str(source), corpus=url, unit_samples=EACH, workers=0))
    return Corpus(url)


@pytest.fixture(scope="module")
def rows(remote: Corpus) -> pa.Table:
    found = remote.samples(["key", "shard", "byte_offset", "byte_size"]).sort_by("key")
    return found.append_column("quality", pa.array([0.5] * len(found), pa.float32()))


def read(cache: ShardCache, row: dict[str, object]) -> bytes:
    return cache.read(row["shard"], row["byte_offset"], row["byte_size"])  # type: ignore[arg-type]


def copies(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*.tar")}


def first_of_each(rows: pa.Table) -> list[dict[str, object]]:
    """One row of each shard, in the order of the shards."""
    found = {row["shard"]: row for row in rows.to_pylist()}
    return [found[name] for name in sorted(found)]


def test_a_copy_is_fetched_once_and_proved_again_when_it_changed(
    remote: Corpus, rows: pa.Table, tmp_path: Path
) -> None:
    row = rows.to_pylist()[0]
    expected = remote.storage.read_range(row["shard"], row["byte_offset"], row["byte_size"])
    assert read(ShardCache(remote, str(tmp_path)), row) == expected
    (copy,) = copies(tmp_path).values()
    inode = copy.stat().st_ino
    assert read(ShardCache(remote, str(tmp_path)), row) == expected
    assert copy.stat().st_ino == inode
    for damage in (copy.read_bytes()[:-1], b"x" * copy.stat().st_size):  # as a crash, or another user, leaves it
        copy.write_bytes(damage)
        assert read(ShardCache(remote, str(tmp_path)), row) == expected
    assert copy.read_bytes() == remote.storage.read(row["shard"])


def test_a_shard_that_the_manifest_does_not_mean_is_refused(remote: Corpus, rows: pa.Table, tmp_path: Path) -> None:
    row = rows.to_pylist()[0]
    sound = remote.storage.read(row["shard"])
    remote.storage.publish(row["shard"], sound[:-1] + b"x")
    try:
        with pytest.raises(VerificationError, match="size and sha256 of the manifest"):
            read(ShardCache(remote, str(tmp_path)), row)
    finally:
        remote.storage.publish(row["shard"], sound)
    assert not copies(tmp_path)


def test_what_was_not_used_for_longest_makes_room(remote: Corpus, rows: pa.Table, tmp_path: Path) -> None:
    chosen = first_of_each(rows)
    largest = max(remote.manifest().object(str(row["shard"])).bytes for row in chosen)
    cache = ShardCache(remote, str(tmp_path), gib=2.5 * largest / 2**30)
    names = [Path(str(row["shard"])).name for row in chosen]
    read(cache, chosen[0])
    read(cache, chosen[1])
    read(ShardCache(remote, str(tmp_path)), chosen[0])  # another process, which finds its copy
    read(cache, chosen[2])
    assert copies(tmp_path).keys() == {names[0], names[2]}
    again = remote.storage.read_range(*[chosen[1][name] for name in ("shard", "byte_offset", "byte_size")])
    assert read(cache, chosen[1]) == again, "a copy that is open may be removed, and is read on"
    for row in chosen:
        read(cache, row)
    assert len(copies(tmp_path)) == 2
    removed = [fd for fd in cache.open_files.values() if os.fstat(fd).st_nlink == 0]
    assert len(removed) <= 1, "what others removed is closed at the next fetch"

    tiny = ShardCache(remote, str(tmp_path), gib=1e-9)
    assert read(tiny, chosen[4]) and read(tiny, chosen[0])
    assert len(copies(tmp_path)) == 1


def test_the_folder_of_the_system_is_of_this_user_alone(
    remote: Corpus, rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    row = rows.to_pylist()[0]
    read(ShardCache(remote), row)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="open to other users"):
        read(ShardCache(remote), row)


def test_an_order_by_blocks_sees_all_needs_few_shards_and_goes_on_anywhere(
    remote: Corpus, rows: pa.Table, tmp_path: Path
) -> None:
    def feed(rank: int = 0, world: int = 1) -> IndexedFeed:
        config = FeedConfig(cache=str(tmp_path), shards_per_block=2)
        samples = Samples(remote.storage.url, rows, config, preset("tiny32"), None, None, 7)
        return IndexedFeed(samples, 6, rank, world, CPU)

    batches = [batch.index.tolist() for batch in islice(feed().batches(0), 5)]
    seen = [index for batch in batches for index in batch]
    epochs = [seen[: SHARDS * EACH], seen[SHARDS * EACH :]]
    assert all(sorted(epoch) == list(range(SHARDS * EACH)) for epoch in epochs) and epochs[0] != epochs[1]
    names = rows["shard"].to_pylist()
    assert {len({names[index] for index in batch}) for batch in batches[:2]} == {2}
    assert [batch.index.tolist() for batch in islice(feed().batches(12), 3)] == batches[2:]
    halves = [next(feed(rank, 2).batches(6)).index.tolist() for rank in range(2)]
    assert halves[0] + halves[1] == batches[1]
    samples = feed().samples
    assert [samples.position(*samples.at(place)) for place in range(30)] == list(range(30))
