"""Of a corpus that went through every step no file can change or go without ``verify`` saying so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iqpir.errors import VerificationError
from pipeline.commits.records import commit
from pipeline.commits.units import SchedulingConfig
from pipeline.curate import CurateConfig, curate
from pipeline.dedup import DedupConfig, dedup
from pipeline.encode import EncodeConfig, encode
from pipeline.gc import GcConfig, gc
from pipeline.label import LabelConfig, label
from pipeline.score import ScoreConfig, score
from pipeline.shard import ShardResult
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, VerifyResult, verify
from tests.pipeline.tiny_checkpoint import write_checkpoint

HERE = SchedulingConfig(workers=0)
FOLDERS = {"_commits", "_manifest", "_plan", "calibrations", "codes", "dedup", "hashes", "labels", "samples", "scores"}
FOLDERS |= {"shards", "views"}


@pytest.fixture
def complete(draw: Callable[..., Path], sharded: Callable[..., ShardResult], tmp_path: Path) -> Path:
    """Two generations, a unit each; scored, labelled twice, searched for duplicates, curated, encoded."""
    for first, count in ((0, 3), (3, 2)):
        url = sharded(draw(count, first=first)).corpus
        score(ScoreConfig(corpus=url, metrics=["rank"], scheduling=HERE))
        label(LabelConfig(corpus=url, metrics=["rank"]))
    dedup(DedupConfig(corpus=url, scheduling=HERE))
    curate(CurateConfig(corpus=url, name="all", dedup="default", holdout=0.3))
    write_checkpoint(tmp_path / "stage1", stage="stage1")
    encode(EncodeConfig(corpus=url, stage1=str(tmp_path / "stage1"), fit="resize", scheduling=HERE))
    return Path(url)


def found(root: Path, deep: bool) -> VerifyResult | None:
    """What verify says of a corpus; None: that it lies."""
    try:
        return verify(VerifyConfig(corpus=str(root), workers=0, deep=deep))
    except VerificationError:
        return None


@pytest.mark.slow
def test_every_file_that_is_changed_or_deleted_is_found(complete: Path, rng: np.random.Generator) -> None:
    whole = found(complete, deep=True)
    assert whole is not None and (whole.units, whole.samples, whole.unfinished, whole.orphans) == (2, 5, {}, 0)
    files = [path for path in sorted(complete.rglob("*")) if path.is_file()]
    assert {path.relative_to(complete).parts[0] for path in files} == {*FOLDERS, "_SUCCESS", "shards.txt"}
    silent = []
    for path in files:
        name, data = path.relative_to(complete).as_posix(), path.read_bytes()
        payload = path.suffix in (".tar", ".parquet")
        for position in {0, len(data) - 1, *rng.integers(0, len(data), 2 if payload else 12).tolist()}:
            changed = bytearray(data)
            changed[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            if found(complete, deep=payload) is not None:
                silent.append(f"{name} with byte {position} {data[position]} -> {changed[position]}")
        path.unlink()
        left = found(complete, deep=False)
        # What the last step of a chain has recorded of a unit is as if it had never been done.
        last_step = name.startswith("_commits/encode/")
        if left is not None and not (last_step and left.orphans == 1 and sum(left.unfinished.values()) == 1):
            silent.append(f"{name} deleted")
        path.write_bytes(data)
    assert not silent, silent
    assert found(complete, deep=True) is not None


def test_the_records_of_a_unit_that_was_done_again_have_to_stay(complete: Path) -> None:
    """Both: that of before, and the one that labels were made of since."""
    first = sorted(complete.glob("_commits/score-rank/*/*.json"))[0]
    record = json.loads(first.read_bytes())
    commit(Storage.open(str(complete)), record["step"], record["fingerprint"], record["unit_id"], record, retry=1)
    label(LabelConfig(corpus=str(complete), name="again", metrics=["rank"]))
    assert found(complete, deep=True) is not None
    for path in (first, first.with_name(f"{first.stem}~1.json")):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(VerificationError, match=rf"{path.name}: is missing"):
            verify(VerifyConfig(corpus=str(complete), workers=0))
        path.write_bytes(data)


def test_documents_keep_their_one_form(complete: Path) -> None:
    """A change that means the same is a change: white space, and the form of a number."""
    for pattern in ("calibrations/*.json", "_commits/score-rank/*/*.json", "views/all/*.json", "_plan/*.json"):
        path = sorted(complete.glob(pattern))[0]
        data = path.read_bytes()
        path.write_bytes(data.replace(b"\n ", b"\n\t", 1))
        with pytest.raises(VerificationError, match="form that documents"):
            verify(VerifyConfig(corpus=str(complete), workers=0, deep=False))
        path.write_bytes(data)


def test_rows_of_a_view_without_facts_are_told_and_gc_removes_them(complete: Path) -> None:
    """As curate leaves them when it dies between the two."""
    rows = complete / "views" / "all" / "v0001.parquet"
    shutil.copyfile(rows, rows.with_name("v0002.parquet"))
    with pytest.raises(VerificationError, match=r"v0002\.json: is missing.*jobs/gc\.py"):
        verify(VerifyConfig(corpus=str(complete), workers=0))
    assert gc(GcConfig(corpus=str(complete), grace_hours=0.0, dry_run=False)).removed == 1
    assert rows.exists() and not rows.with_name("v0002.parquet").exists()
    assert found(complete, deep=True) is not None
