import functools
import os
import uuid
from pathlib import Path

import pytest

from pipeline.storage import Storage
from pipeline.stores.objects import S3Objects
from tests.chaos.conftest import draw, finish
from tests.chaos.invariants import files, require_finished
from tests.chaos.mortal_work import MortalWork
from tests.pipeline.corpus.conftest import Requests

DEATHS = {0: (1, "begun"), 1: (1, "made"), 2: (2, "written"), 3: (3, "written"), 4: (3, "made")}


@pytest.mark.slow
def test_workers_that_die_at_any_step_of_a_unit_change_no_byte(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    """One process, two workers of which five die, and four workers make the same corpus."""
    source = draw(folder / "input", 24)
    here, two, four = (Storage.open(str(folder / name)) for name in ("here", "two", "four"))
    finish(source, here)
    finish(source, four, workers=4)
    require_finished(four, files(here))

    graves = tmp_path / "graves"
    graves.mkdir()
    mortal = functools.partial(MortalWork, deaths=DEATHS, graves=str(graves))
    monkeypatch.setattr("pipeline.shard.ShardWork", mortal)
    result = finish(source, two, workers=2)
    assert {int(path.name) for path in graves.iterdir()} == DEATHS.keys()
    assert (result.samples, result.units) == (24, 6)
    require_finished(two, files(here))


@pytest.mark.slow
def test_workers_that_die_at_any_request_of_a_unit_change_no_byte(
    tmp_path: Path, s3: Requests, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    """Two workers that write to a bucket, of which four die, before and after requests."""
    source, here = draw(tmp_path / "input", 16), Storage.open(str(tmp_path / "here"))
    bucket = Storage.open(f"s3://pictures/{uuid.uuid4().hex}")
    finish(source, here)
    graves = tmp_path / "graves"
    graves.mkdir()
    deaths = {0: (1, "made"), 1: (2, "begun"), 2: (3, "begun"), 3: (3, "made")}
    account = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    mortal = functools.partial(MortalWork, deaths=deaths, graves=str(graves), store=S3Objects, environment=account)
    monkeypatch.setattr("pipeline.shard.ShardWork", mortal)
    result = finish(source, bucket, workers=2)
    assert {int(path.name) for path in graves.iterdir()} == deaths.keys()
    assert (result.samples, result.units) == (16, 4)
    require_finished(bucket, files(here))
