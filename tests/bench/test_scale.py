"""A million rows through the functions that the driver runs: linear time, and less than 1 kB of memory each."""

from pathlib import Path

import pytest

from pipeline.bench import rows
from pipeline.bench.measure import LARGEST_BYTES

SMALL, LARGE = 100_000, 1_000_000
STEEPEST = 5.0
"""Times linear; a quadratic step has ten. Loose: other work on the machine slows one size and not the other."""


@pytest.mark.slow
def test_a_million_rows_are_planned_chosen_and_verified_in_linear_time_and_little_memory(
    tmp_path: Path,
) -> None:
    corpora = {count: str(tmp_path / f"corpus-{count}") for count in (rows.FEW, SMALL, LARGE)}
    few = corpora[rows.FEW]

    def measured(step: str) -> None:
        found = {count: rows.in_a_process(step, few, corpora[count], count) for count in (SMALL, LARGE)}
        assert {count: one["seen"] for count, one in found.items()} == {SMALL: SMALL, LARGE: LARGE}, step
        assert found[LARGE]["bytes"] / LARGE <= LARGEST_BYTES, step
        # Half a second is for what does not depend on rows.
        seconds = found[SMALL]["seconds"] + 0.5
        assert found[LARGE]["seconds"] <= STEEPEST * LARGE / SMALL * seconds, step

    measured("plan")
    for corpus in corpora.values():
        rows.write_units(corpus)
    measured("resume")
    measured("seal")
    for corpus in corpora.values():
        rows.label_rows(corpus)
    measured("select")
    measured("verify")
