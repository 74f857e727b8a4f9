"""Planning: what is appended, what is removed, and at what cost."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commits.plan import extend_plan, read_generations
from pipeline.corpus import Corpus
from pipeline.shard import ShardConfig, ShardResult
from pipeline.sharding.shard_unit import ShardWork
from pipeline.sources.find import SourceConfig, find_inputs
from pipeline.sources.inputs import Listing, table_of
from pipeline.storage import Entry, Storage
from pipeline.verify import VerifyConfig, verify
from tests.source_files import REPOSITORY

Draw = Callable[..., Path]
Sharded = Callable[..., ShardResult]


def live(corpus: str) -> set[str]:
    return set(Corpus(corpus).samples(["relpath"])["relpath"].to_pylist())


def test_pruning_hides_what_is_gone_and_rewrites_no_unit(draw: Draw, sharded: Sharded, tmp_path: Path) -> None:
    source = draw(6)
    first = sharded(source)
    payload = {path: path.read_bytes() for path in (tmp_path / "corpus").glob("s*/*")}
    (source / "001.png").unlink()
    (source / "004.png").unlink()
    result = sharded(source, prune=True)
    assert live(result.corpus) == {f"{number:03d}.png" for number in (0, 2, 3, 5)}
    assert (result.version, result.inputs, result.success, result.samples) == (2, 4, 4, 4)
    assert {path: path.read_bytes() for path in (tmp_path / "corpus").glob("s*/*")} == payload
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 4
    assert sharded(source, prune=True).manifest == sharded(source).manifest == result.manifest != first.manifest


def test_a_pruned_input_that_comes_back_is_planned_again(draw: Draw, sharded: Sharded) -> None:
    source = draw(3)
    sharded(source)
    (source / "001.png").rename(source.parent / "kept.png")
    sharded(source, prune=True)
    (source.parent / "kept.png").rename(source / "001.png")
    result = sharded(source)
    assert len(live(result.corpus)) == result.samples == 3 and result.version == 3
    assert verify(VerifyConfig(corpus=result.corpus, workers=0)).inputs == 3
    assert sharded(source, prune=True).manifest == result.manifest


def test_pruning_and_appending_at_once_keep_other_collections(draw: Draw, sharded: Sharded) -> None:
    sharded(draw(3, "other"), collection="other")
    source = draw(3)
    sharded(source)
    (source / "000.png").unlink()
    draw(2, first=7)
    result = sharded(source, prune=True)
    assert result.samples == 3 + 4 and verify(VerifyConfig(corpus=result.corpus, workers=0)).samples == 7


def test_a_plan_without_removals_is_what_it_was_before_there_were_any(draw: Draw, sharded: Sharded) -> None:
    (generation,) = read_generations(Storage.open(sharded(draw(3)).corpus))
    assert "source" not in generation.facts and len(generation.facts["objects"]) == 1
    assert generation.table.column_names == ["unit_id", "ordinal", "relpath", "size", "etag"]


@pytest.mark.parametrize("change", ["content", "gone"])
def test_an_input_that_changes_under_the_run_is_a_row(change: str, draw: Draw, tmp_path: Path) -> None:
    """Planned, then changed before its unit is worked on."""
    source, storage = draw(3), Storage.open(str(tmp_path / "corpus"))
    config = ShardConfig(input=str(source), corpus=storage.url)
    (generation,) = extend_plan(storage, find_inputs(config.input, SourceConfig()), "images", config.settings)
    if change == "gone":
        (source / "001.png").unlink()
    else:
        (source / "001.png").write_bytes((source / "002.png").read_bytes())
        os.utime(source / "001.png", ns=(1, 1))
    work = ShardWork(corpus=storage, pixels=config.pixels, min_side=1, threads=1)
    record = work(next(generation.units()))
    assert record["statuses"] == {"success": 2, f"failed_{'missing' if change == 'gone' else 'input_changed'}": 1}


def entries(count: int) -> Listing:
    found = (Entry(f"folder/{number:09d}/picture.png", 100_000, str(10**18 + number), 0.0) for number in range(count))
    return Listing(url="/pictures", table=table_of(found), ignored=0)


def test_planning_takes_linear_time(tmp_path: Path) -> None:
    settings = ShardConfig(input="a", corpus="b").settings
    seconds = []
    for count in (20_000, 80_000):
        listing, storage = entries(count), Storage.open(str(tmp_path / str(count)))
        began = time.process_time()
        extend_plan(storage, listing, "images", settings)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 4 * seconds[0] * 2 + 0.5


MEMORY = r"""
import re, sys
from pathlib import Path
from tests.pipeline.corpus.test_plan import entries
from pipeline.commits.plan import extend_plan
from pipeline.shard import ShardConfig
from pipeline.storage import Storage
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
count = int(sys.argv[1])
extend_plan(Storage.open(sys.argv[2] + "/warm"), entries(2000), "images", ShardConfig(input="a", corpus="b").settings)
before = peak()
extend_plan(Storage.open(sys.argv[2] + "/full"), entries(count), "images", ShardConfig(input="a", corpus="b").settings)
print((peak() - before) / count)
"""


@pytest.mark.slow
def test_planning_takes_less_than_a_kilobyte_an_input(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "100000", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < float(done.stdout) < 1000


def test_units_are_cut_at_the_same_inputs_whatever_the_columns_are_chunked_like(tmp_path: Path) -> None:
    settings = {**ShardConfig(input="a", corpus="b").settings, "unit_bytes": 1_050_000}
    listing = entries(100)
    chunks = [listing.table.slice(start, 7) for start in range(0, 100, 7)]
    chunked = Listing(url=listing.url, table=pa.concat_tables(chunks), ignored=0)
    plans = [
        extend_plan(Storage.open(str(tmp_path / name)), each, "images", settings)[0]
        for name, each in (("a", listing), ("b", chunked))
    ]
    assert plans[0].facts == plans[1].facts and plans[0].facts["units"] == 10
    assert np.array_equal(np.bincount(plans[0].table["ordinal"].to_numpy()), [10] * 10)
