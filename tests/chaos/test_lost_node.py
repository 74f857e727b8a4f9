import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.storage import Storage
from tests.chaos.conftest import draw, finish
from tests.chaos.invariants import files, require_finished
from tests.source_files import REPOSITORY

PICTURES = 14


@pytest.mark.slow
def test_a_cluster_that_loses_a_driver_and_a_node_makes_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    source = draw(folder / "input", PICTURES)
    here, there = Storage.open(str(folder / "here")), Storage.open(str(folder / "there"))
    finish(source, here, unit_samples=1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.lose_driver_and_node", source, there.url, tmp_path],
        cwd=REPOSITORY,
        env={**environment, **token, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_bytes())
    assert told["code"] == -9 and 2 <= told["committed"] < PICTURES
    assert told["alive"] == 2, "the head and the node that is left"
    assert told["again"] >= 1, "a unit of the lost node was done again"
    require_finished(there, files(here))
