"""Row ``resume``: how long a job needs to see that a corpus of many units is done."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iqpir.config import digest
from pipeline.bench.measure import Measured, Options, alternate, require_equal
from pipeline.bench.peers import peer
from pipeline.bench.plan import name_inputs
from pipeline.commits.plan import ShardUnit, extend_plan, read_generations
from pipeline.commits.records import finished
from pipeline.commits.units import run_units
from pipeline.layout import commit_prefix, to_json
from pipeline.shard import STEP, ShardConfig
from pipeline.sources.find import SourceConfig, find_inputs
from pipeline.storage import Entry, Storage

LARGEST_SECONDS = 5.0
LARGEST_COUNT = 10_000
"""The demand in seconds is for so many units."""


class CountingStorage(Storage):
    """A storage that counts the listings of commit records."""

    listings = 0

    def list(self, prefix: str = "") -> list[Entry]:
        """As ``Storage.list``."""
        CountingStorage.listings += prefix.startswith("_commits")
        return super().list(prefix)


def run(options: Options) -> Measured:
    """Units a second that are read from the plan and found done: one listing, against a question for each."""
    corpus, fingerprint = _finished_corpus(options.folder, options.count)
    prefix = commit_prefix(STEP, fingerprint)
    classic = peer("resume")

    def ours() -> int:
        storage = CountingStorage.open(corpus)
        known = finished(storage, STEP, fingerprint)
        units = (unit for item in read_generations(storage) for unit in item.units())
        report = run_units(storage, STEP, fingerprint, units, _no_work, total=options.count, known=known)
        return report.skipped

    def theirs() -> int:
        storage = Storage.open(corpus)
        units = (unit for item in read_generations(storage) for unit in item.units())
        done: int = classic.count_done(storage, prefix, units)
        return done

    checked: dict[str, float] = {}
    require_equal(checked, "units that ours takes for undone", options.count - ours(), 0)
    require_equal(checked, "units that the peer takes for undone", options.count - theirs(), 0)
    CountingStorage.listings = 0
    rates = alternate(ours, theirs, options.count, options.runs)
    seconds, listings = options.count / statistics.median(rates[0]), CountingStorage.listings / options.runs
    missed = [f"{listings} listings of records"] if listings != 1 else []
    if seconds > LARGEST_SECONDS * max(1.0, options.count / LARGEST_COUNT):
        missed.append(f"{seconds:.1f} s for {options.count} units")
    facts = {"seconds": round(seconds, 3), "listings": listings}
    return Measured(ours=rates[0], peer=rates[1], unit="units/s", checked=checked, facts=facts, missed=tuple(missed))


def _no_work(unit: ShardUnit) -> Mapping[str, Any]:
    raise AssertionError(f"unit {unit.ordinal} is done and was worked on again")


def _finished_corpus(folder: Path, count: int) -> tuple[str, str]:
    """A plan of ``count`` units and their commit records, written without the flush of a commit.

    Returns:
        URL of the corpus, fingerprint of the step.
    """
    source, corpus = str(name_inputs(folder / "inputs", count)), str(folder / "corpus")
    settings = ShardConfig(input=source, corpus=corpus, unit_samples=1).settings
    fingerprint = digest(settings)
    generations = extend_plan(Storage.open(corpus), find_inputs(source, SourceConfig()), "images", settings)
    records = folder / "corpus" / commit_prefix(STEP, fingerprint)
    records.mkdir(parents=True)
    for generation in generations:
        for unit in generation.units():
            record = {"unit_id": unit.unit_id, "ordinal": unit.ordinal, "step": STEP, "fingerprint": fingerprint}
            (records / f"{unit.unit_id}.json").write_bytes(to_json(record))
    return corpus, fingerprint
