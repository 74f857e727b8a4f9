"""Row ``plan``: the driver's seconds and memory for planning many inputs.

Each size is planned in a process of its own (``python -m pipeline.bench.plan WARMUP INPUT CORPUS``). It plans a few
inputs first, which loads libraries and fills pools; what its peak memory rises by afterwards is what inputs cost.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pipeline.bench.measure import Measured, Options, peak_memory, require_equal, scaling
from pipeline.bench.pictures import encoded, picture
from pipeline.commits.plan import extend_plan
from pipeline.shard import ShardConfig
from pipeline.sources.find import SourceConfig, find_inputs
from pipeline.storage import Storage

_LINKS = 30_000
"""Names of one file: ext4 allows 65,000."""
_PER_FOLDER = 1000


def run(options: Options) -> Measured:
    """Inputs a second at the largest size against those at the smallest; every size in turn, ``runs`` times."""
    folders = {count: name_inputs(options.folder / f"inputs-{count}", count) for count in options.sizes}
    few = name_inputs(options.folder / "few", 10)
    found: dict[int, list[dict[str, float]]] = {count: [] for count in options.sizes}
    checked: dict[str, float] = {}
    for _ in range(options.runs):
        for count, folder in folders.items():
            corpus = options.folder / "corpus"
            one = _in_a_process(few, folder, corpus)
            shutil.rmtree(corpus)
            require_equal(checked, f"inputs of {count} that are not planned", abs(count - one["planned"]), 0)
            found[count].append(one)
    return scaling(found, "inputs/s", checked)


def name_inputs(folder: Path, count: int) -> Path:
    """``count`` names of a few picture files, a thousand in a folder: names are what planning reads."""
    folder.mkdir(parents=True)
    originals = folder.with_name(f"{folder.name}-originals")
    originals.mkdir()
    for number in range(0, count, _LINKS):
        (originals / f"{number}.jpg").write_bytes(encoded(picture(number // _LINKS, 64), "jpeg"))
    for number in range(count):
        path = folder / f"{number // _PER_FOLDER:05d}" / f"{number:08d}.jpg"
        if number % _PER_FOLDER == 0:
            path.parent.mkdir()
        os.link(originals / f"{number // _LINKS * _LINKS}.jpg", path)
    return folder


def plan_inputs(source: str, corpus: str) -> dict[str, float]:
    """List the inputs and plan them, as ``jobs/shard.py`` does; what it took.

    ``bytes`` is by how much the peak of this process rose.
    """
    settings = ShardConfig(input=source, corpus=corpus).settings
    before = peak_memory()
    start = time.perf_counter()
    listing = find_inputs(source, SourceConfig())
    listed = time.perf_counter()
    generations = extend_plan(Storage.open(corpus), listing, "images", settings)
    planned = time.perf_counter()
    return {
        "planned": sum(item.facts["inputs"] for item in generations),
        "units": sum(item.facts["units"] for item in generations),
        "seconds": planned - start,
        "listing_seconds": listed - start,
        "bytes": peak_memory() - before,
    }


def _in_a_process(few: Path, source: Path, corpus: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.bench.plan", str(few), str(source), str(corpus)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    few, source, corpus = sys.argv[1:]
    plan_inputs(few, f"{corpus}-few")
    shutil.rmtree(f"{corpus}-few")
    sys.stdout.write(json.dumps(plan_inputs(source, corpus)) + "\n")
