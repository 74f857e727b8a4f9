"""Time two sides of a comparison alternately, and say how far the runs lie apart."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from iqpir.errors import VerificationError

Source = Literal["jpeg", "png"]
LARGEST_BYTES = 1000.0
"""Of a driver's memory for each input."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a row is run with; its own defaults where nothing else was asked for."""

    folder: Path
    """Scratch folder, empty."""
    runs: int
    """Times that each side is measured."""
    threads: int
    """Threads of torch and OpenCV, on both sides."""
    device: str
    """``cpu`` or ``cuda``."""
    count: int = 0
    """Pictures, or units."""
    size: int = 0
    """Side of the pictures in pixels."""
    batch: int = 0
    """Pictures in a batch."""
    preset: str = ""
    """Network."""
    source: Source = "jpeg"
    """How the pictures are stored."""
    sizes: tuple[int, ...] = ()
    """Numbers of inputs."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates of both sides, a value each run; the higher the better."""

    ours: Sequence[float]
    peer: Sequence[float]
    unit: str
    checked: dict[str, float]
    """What was compared before the clock ran, and how far it differed."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else was measured."""
    missed: tuple[str, ...] = ()
    """Demands besides the ratio that were not met."""

    @property
    def ratio(self) -> float:
        """Median of ours over median of the peer."""
        return statistics.median(self.ours) / statistics.median(self.peer)


def alternate(
    ours: Callable[[], object],
    peer: Callable[[], object],
    work: float,
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """``work`` per second of both, ``runs`` values each.

    Whoever went second goes first in the next run, so that a machine that slows down wrongs neither.

    Args:
        ours, peer: one run; whatever is built or read for the first time was so before.
        work: pictures, steps or units of one run.
        runs: at least 1.
        clock: seconds; ``time.process_time`` where both sides are one thread, which other processes cannot disturb.
    """
    rates: dict[bool, list[float]] = {True: [], False: []}
    for run in range(runs):
        for is_ours in (True, False) if run % 2 == 0 else (False, True):
            start = clock()
            (ours if is_ours else peer)()
            rates[is_ours].append(work / (clock() - start))
    return rates[True], rates[False]


def scaling(found: Mapping[int, Sequence[Mapping[str, float]]], unit: str, checked: dict[str, float]) -> Measured:
    """The rate at the largest size against that at the smallest: 1 is linear time.

    Args:
        found: size, rising -> for each run ``seconds``, ``bytes`` of memory, and what else was counted.
        unit: of the rates.
        checked: as in ``Measured``.
    """
    facts = {str(count): _scaled(count, values) for count, values in found.items()}
    smallest, largest = min(found), max(found)
    memory = facts[str(largest)]["bytes_per_input"]
    return Measured(
        ours=[largest / one["seconds"] for one in found[largest]],
        peer=[smallest / one["seconds"] for one in found[smallest]],
        unit=unit,
        checked=checked,
        facts=facts,
        missed=(f"{memory:.0f} bytes of memory for each input",) if memory > LARGEST_BYTES else (),
    )


def _scaled(count: int, values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    median = {name: statistics.median(one[name] for one in values) for name in values[0]}
    memory = median.pop("bytes") / count
    return {**{name: round(value, 3) for name, value in median.items()}, "bytes_per_input": round(memory, 1)}


def peak_memory() -> int:
    """Bytes that this program has held at most. Not ``ru_maxrss``: on Linux a new program starts with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes, and the program's own


def spread(values: Sequence[float]) -> float:
    """Distance between the quartiles over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def require_equal(checked: dict[str, float], what: str, difference: float, largest: float) -> None:
    """Note a difference in ``checked``.

    Raises:
        VerificationError: it is over ``largest`` (or not a number): there is no ratio to speak of.
    """
    if not difference <= largest:
        raise VerificationError(
            f"The two sides differ: {what} is {difference:.3g}, at most {largest:.3g} is allowed.",
            "Nothing was measured.",
        )
    checked[what] = difference
