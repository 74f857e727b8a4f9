"""A folder is restored in batches that are recorded as they are done: what dies goes on, and no record lies."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iqpir.errors import IncompleteError, UsageError
from iqpir.restorer import Restorer
from pipeline.commits.units import SchedulingConfig
from pipeline.restore import PARTS, RECORD, BatchRestorer, Item, RestoreConfig, batches, restore
from tests.conftest import draw_picture
from tests.pipeline.tiny_checkpoint import write_checkpoint

COUNT = 7
HERE = SchedulingConfig(workers=0)
"""In this process, whether Ray is up for other tests or not."""
ONCE = SchedulingConfig(workers=0, attempts=1)


class Folder:
    """Pictures of several sizes, one of them cut off, and a model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "in/deep").mkdir(parents=True)
        for seed in range(COUNT - 1):
            place = root / "in" / ("deep" if seed % 2 else "")
            Image.fromarray(draw_picture(seed, 24 + 8 * seed)).save(place / f"{seed}.png")
        (root / "in/cut.png").write_bytes((root / "in/0.png").read_bytes()[:300])
        write_checkpoint(root / "checkpoint")
        self.config = RestoreConfig(
            model=str(root / "checkpoint"),
            input=str(root / "in"),
            output=str(root / "out"),
            batch=2,
            scheduling=HERE,
        )

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "out" / RECORD).read_text().splitlines()]

    def written(self) -> dict[str, int]:
        out = self.root / "out"
        return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.png")}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_each_picture_is_what_the_restorer_makes_of_it_alone(folder: Folder) -> None:
    result = restore(folder.config)
    assert (result.inputs, result.restored, result.failed, result.skipped) == (COUNT, COUNT - 1, 1, 0)
    restorer = Restorer.load(folder.root / "checkpoint")
    rows = folder.rows()
    assert [row["relpath"] for row in rows] == sorted(row["relpath"] for row in rows) and len(rows) == COUNT
    for row in rows:
        if row["relpath"] == "cut.png":
            assert row["output"] is None and row["error"].startswith("truncated")
            continue
        alone = restorer.restore(np.asarray(Image.open(folder.root / "in" / row["relpath"])), 0.95)
        together = np.asarray(Image.open(folder.root / "out" / row["output"]))
        assert np.abs(together.astype(int) - alone).max() <= 1
    assert not (folder.root / "out" / PARTS).exists() or not list((folder.root / "out" / PARTS).rglob("*.jsonl"))


def test_a_run_that_died_goes_on_after_its_last_batch(folder: Folder) -> None:
    whole = dataclasses.replace(folder.config, output=str(folder.root / "whole"))
    restore(whole)
    rows = [json.loads(line) for line in (folder.root / "whole" / RECORD).read_text().splitlines()]
    # As a process leaves it that is killed after its first batch, in the middle of storing the second.
    first = [Item(row["relpath"], row["etag"], row["relpath"]) for row in rows if row["output"]][:2]
    BatchRestorer(folder.config, rows[0]["request"])(first)
    (folder.root / "out" / "5.png.tmp").write_bytes(b"half")
    before = folder.written()
    assert len(before) == 2 and not (folder.root / "out" / RECORD).exists()

    result = restore(folder.config)
    assert (result.restored, result.failed, result.skipped) == (COUNT - 1, 1, 2)
    after = folder.written()
    assert {name: after[name] for name in before} == before and len(after) == COUNT - 1
    assert folder.rows() == rows
    again = restore(folder.config)
    assert (again.skipped, folder.written()) == (COUNT - 1, after)


def test_outputs_of_another_request_are_never_taken_for_ones_own(folder: Folder) -> None:
    restore(folder.config)
    # Another request dies in its last batch, when it has written over the others.
    place = folder.root / "out/deep/5.png"
    place.unlink()
    place.mkdir()
    with pytest.raises(IncompleteError):
        restore(dataclasses.replace(folder.config, quality=0.1, scheduling=ONCE))
    place.rmdir()

    assert restore(folder.config).skipped == 0
    restorer = Restorer.load(folder.root / "checkpoint")
    for row in folder.rows():
        if row["output"]:
            expected = restorer.restore(np.asarray(Image.open(folder.root / "in" / row["relpath"])), 0.95)
            found = np.asarray(Image.open(folder.root / "out" / row["output"]))
            assert np.abs(found.astype(int) - expected).max() <= 1
    assert not list((folder.root / "out" / PARTS).rglob("*.jsonl"))


def test_a_changed_input_and_a_lost_output_are_made_again(folder: Folder) -> None:
    restore(folder.config)
    Image.fromarray(draw_picture(9, 40)).save(folder.root / "in/0.png")
    (folder.root / "out/deep/1.png").unlink()
    assert restore(folder.config).skipped == COUNT - 3
    assert Image.open(folder.root / "out/0.png").size == (40, 40) and (folder.root / "out/deep/1.png").exists()


def test_batches_are_bounded_in_pictures_and_bytes() -> None:
    items = [Item(str(number), "", "") for number in range(6)]
    sizes = {str(number): size for number, size in enumerate([1, 1, 1, 33 << 20, 16 << 20, 17 << 20])}
    found = [[item.relpath for item in batch] for batch in batches(items, sizes, 2)]
    assert found == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]


def test_a_fidelity_that_the_model_has_not_learnt_writes_nothing(folder: Folder) -> None:
    with pytest.raises(UsageError, match="fidelity"):
        restore(dataclasses.replace(folder.config, fidelity=0.5))
    assert not (folder.root / "out").exists()


def test_a_batch_that_cannot_be_stored_ends_incomplete_and_the_others_are_recorded(folder: Folder) -> None:
    config = dataclasses.replace(folder.config, scheduling=ONCE)
    blocked = folder.root / "out" / "4.png"
    blocked.mkdir(parents=True)
    with pytest.raises(IncompleteError, match=r"are not restored.*IsADirectoryError"):
        restore(config)
    assert len(list((folder.root / "out" / PARTS).rglob("*.jsonl"))) == 3
    blocked.rmdir()
    assert restore(config).skipped >= 3
    assert len(folder.rows()) == COUNT


@pytest.mark.slow
def test_on_ray_actors_restore_the_same(folder: Folder, local_ray: None) -> None:
    restore(folder.config)
    spread = dataclasses.replace(
        folder.config, output=str(folder.root / "spread"), scheduling=SchedulingConfig(workers=2, cpus=1.0)
    )
    assert restore(spread).restored == COUNT - 1
    assert (folder.root / "spread" / RECORD).read_text() == (folder.root / "out" / RECORD).read_text()
    for name in folder.written():
        assert (folder.root / "spread" / name).read_bytes() == (folder.root / "out" / name).read_bytes()
