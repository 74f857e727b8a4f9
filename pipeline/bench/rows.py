"""Rows ``seal`` and ``select``: the driver's seconds and memory for a corpus of many samples that never had pictures.

Plan, tables, records and labels are what the steps write; shards are a few bytes each, for nothing here reads them.
Each step runs in a process of its own (``python -m pipeline.bench.rows STEP WARMUP CORPUS COUNT``), on a small corpus
first, which loads libraries and fills pools; what its peak memory rises by afterwards is what samples cost.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from iqpir.config import digest
from pipeline.bench.measure import Measured, Options, peak_memory, require_equal, scaling
from pipeline.commits.plan import ShardUnit, extend_plan, read_generations
from pipeline.commits.records import commit, finished
from pipeline.commits.seal import seal
from pipeline.commits.units import run_units
from pipeline.documents import publish_table, stamped
from pipeline.layout import (
    INPUTS,
    SAMPLES,
    SCORES,
    ObjectRef,
    metric_facts_path,
    samples_path,
    scores_path,
    sha256_hex,
    shard_path,
    to_json,
)
from pipeline.shard import STEP, ShardConfig
from pipeline.sources.inputs import Listing
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify

UNIT_SAMPLES = 10_000
FEW = 100
"""Samples of the corpus on which a process warms up."""
METRIC: Mapping[str, Any] = {"name": "made-up", "version": "1", "direction": "higher", "score_range": [0.0, 1.0]}
WHERE = "quality > 0.5 and original_width >= 512"
"""What half of the samples meet."""


def settings() -> dict[str, Any]:
    """Of the planned corpus."""
    return ShardConfig(input="s3://pictures", corpus="corpus", unit_samples=UNIT_SAMPLES).settings


def plan_rows(corpus: str, count: int) -> int:
    """Plan ``count`` inputs that a listing of a thousand objects a folder might have found; how many were."""
    paths = pa.array([f"{number // 1000:06d}/{number:09d}.jpg" for number in range(count)])
    sizes = pa.array(50_000 + np.arange(count) % 1000)
    table = pa.table([paths, sizes, _hex(0, count, 32)], schema=pa.schema(list(INPUTS)[2:]))
    listing = Listing(url="s3://pictures", table=table, ignored=0)
    generations = extend_plan(Storage.open(corpus), listing, "images", settings())
    return sum(int(item.facts["inputs"]) for item in generations)


def resume_rows(corpus: str, count: int) -> int:
    """Read the plan, list the records, find nothing to do; how many inputs are done."""
    storage, fingerprint = Storage.open(corpus), digest(settings())
    known = finished(storage, STEP, fingerprint)
    generations = read_generations(storage)
    units = (unit for item in generations for unit in item.units(skip=known))
    total = sum(item.facts["units"] for item in generations) - len(known)
    run_units(storage, STEP, fingerprint, units, _no_work, total=total, known=known)
    return count if total == 0 else 0


def seal_rows(corpus: str, count: int = 0) -> int:
    """Seal; how many samples the manifest has."""
    storage = Storage.open(corpus)
    return seal(storage, read_generations(storage), finished(storage, STEP, digest(settings()))).samples


def select_rows(corpus: str, count: int) -> int:
    """Curate; ``count`` if a view of about half of the samples came out."""
    from pipeline.curate import CurateConfig, curate  # it loads torch, which the other steps do without

    result = curate(CurateConfig(corpus=corpus, name="half", where=WHERE))
    return count if abs(result.samples - count / 2) < 0.1 * count else result.samples


def verify_rows(corpus: str, count: int) -> int:
    """Compare all documents, sizes and counts; what is read of payload besides is the workers'."""
    return verify(VerifyConfig(corpus=corpus, deep=False, workers=0)).samples


STEPS: dict[str, Callable[[str, int], int]] = {
    "plan": plan_rows,
    "resume": resume_rows,
    "seal": seal_rows,
    "select": select_rows,
    "verify": verify_rows,
}
"""Step -> what it does to a corpus of ``count`` inputs; returns the inputs or samples that it has seen."""


def write_units(corpus: str) -> None:
    """What the workers of a planned corpus leave: shards, tables, records, and scores of one metric."""
    storage, scored = Storage.open(corpus), digest(METRIC)
    storage.publish(metric_facts_path("made-up", scored), to_json(stamped({**METRIC, "fingerprint": scored})))
    for generation in read_generations(storage):
        for unit in generation.units():
            table = _write_unit(storage, unit)
            count = table.num_rows
            raw = np.random.default_rng(unit.ordinal).random(count, np.float32)
            columns = [
                table["key"],
                table["sha256"],
                raw,
                *(pa.repeat(value, count) for value in ("success", None, 0.0)),
            ]
            scores = pa.table(columns, names=SCORES.names).cast(SCORES)
            path = functools.partial(scores_path, "made-up", scored, unit.ordinal)
            facts = {"metric": "made-up", "objects": [publish_table(storage, scores, path).to_dict()]}
            commit(storage, "score-made-up", scored, unit.unit_id, facts)


def label_rows(corpus: str) -> None:
    """Labels from the scores of one metric."""
    from pipeline.label import LabelConfig, label  # loads torch, too

    label(LabelConfig(corpus=corpus, metrics=["made-up"]))


def _write_unit(storage: Storage, unit: ShardUnit) -> pa.Table:
    """Store shard, table and record of a unit; returns the table."""
    count, data = len(unit.inputs), f"shard {unit.ordinal}".encode()
    shard = ObjectRef(
        path=shard_path(unit.collection, unit.ordinal, sha256_hex(data)), bytes=len(data), sha256=sha256_hex(data)
    )
    storage.publish(shard.path, data)
    keys = _hex(unit.ordinal, count, 32)
    side = pa.array(256 + 512 * (np.arange(count) % 1000 > 0), pa.int32())
    known = {
        "key": keys,
        "uri": pa.array([f"{unit.source}/{item.relpath}" for item in unit.inputs]),
        "relpath": pa.array([item.relpath for item in unit.inputs]),
        "input_etag": pa.array([item.etag for item in unit.inputs]),
        "sha256": _hex(unit.ordinal, count, 64),
        "member": pa.compute.binary_join_element_wise(keys, "jpg", "."),
        "byte_offset": pa.array(np.arange(count) * 51_200),
        **dict.fromkeys(("width", "height", "original_width", "original_height"), side),
    }
    same = {
        "collection": unit.collection,
        "status": "success",
        "unit_id": unit.unit_id,
        "ordinal": unit.ordinal,
        "shard": shard.path,
        "byte_size": 50_000,
        "input_size": 50_000,
        "format": "jpeg",
        "channels": 3,
        "bit_depth": 8,
        "exif_orientation": 1,
        "icc_profile": False,
    }
    columns = [known.get(name, pa.repeat(same.get(name), count)) for name in SAMPLES.names]
    table = pa.table(columns, names=SAMPLES.names).cast(SAMPLES)
    refs = [shard, publish_table(storage, table, functools.partial(samples_path, unit.ordinal))]
    counts = {**dict.fromkeys(("inputs", "success", "samples", "rows"), count), "rejected": 0, "failed": 0}
    facts = {"ordinal": unit.ordinal, "generation": unit.generation, "collection": unit.collection}
    facts |= {**counts, "statuses": {"success": count}, "objects": [ref.to_dict() for ref in refs]}
    commit(storage, STEP, digest(settings()), unit.unit_id, facts)
    return table


def _hex(seed: int, count: int, digits: int) -> pa.Array:
    """Rising strings of hex digits, as random as digests."""
    data = np.random.default_rng((seed, digits)).bytes(count * digits // 2).hex().encode()
    ordered = np.sort(np.frombuffer(data, f"S{digits}")).tobytes()
    offsets = np.arange(0, (count + 1) * digits, digits, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(ordered))


def _no_work(unit: ShardUnit) -> Mapping[str, Any]:
    raise AssertionError(f"unit {unit.ordinal} is done and was worked on again")


def run_seal(options: Options) -> Measured:
    """Samples a second that are sealed, at the largest size against the smallest."""
    return _run(options, "seal", ("_manifest",), prepare=write_units)


def run_select(options: Options) -> Measured:
    """Samples a second that a condition chooses half of, at the largest size against the smallest."""

    def prepare(corpus: str) -> None:
        write_units(corpus)
        seal_rows(corpus)
        label_rows(corpus)

    return _run(options, "select", ("views",), prepare)


def _run(options: Options, step: str, leaves: Sequence[str], prepare: Callable[[str], None]) -> Measured:
    """Every size in turn, ``runs`` times; ``leaves``: folders that a step leaves and the next run may not see."""
    counts = {str(options.folder / f"corpus-{count}"): count for count in (FEW, *options.sizes)}
    for corpus, count in counts.items():
        plan_rows(corpus, count)
        prepare(corpus)
    few, *corpora = counts
    found: dict[int, list[dict[str, float]]] = {count: [] for count in options.sizes}
    checked: dict[str, float] = {}
    for _ in range(options.runs):
        for corpus in corpora:
            for folder in leaves:
                for where in (few, corpus):
                    shutil.rmtree(Path(where) / folder, ignore_errors=True)
            one = in_a_process(step, few, corpus, counts[corpus])
            require_equal(
                checked, f"samples of {counts[corpus]} that were not seen", counts[corpus] - one.pop("seen"), 0
            )
            found[counts[corpus]].append(one)
    return scaling(found, "samples/s", checked)


def in_a_process(step: str, few: str, corpus: str, count: int) -> dict[str, float]:
    """``seconds`` and ``bytes`` of a step on ``corpus`` in a process that has done it on ``few`` before."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.bench.rows", step, few, corpus, str(count)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(step: str, few: str, corpus: str, count: int) -> dict[str, float]:
    """What a step takes in this process; ``bytes`` is by how much the peak of its memory rose."""
    STEPS[step](few, FEW)
    before = peak_memory()
    start = time.perf_counter()
    seen = STEPS[step](corpus, count)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": peak_memory() - before,
        "seen": seen,
    }


if __name__ == "__main__":
    name, few, corpus, count = sys.argv[1:]
    sys.stdout.write(json.dumps(measure(name, few, corpus, int(count))) + "\n")
