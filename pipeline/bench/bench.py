"""The verb ``bench``: run one row of measurements and say what came out."""

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from rich.console import Console

from iqpir.errors import UsageError
from pipeline.bench.measure import Measured, Options, Source, spread

Name = Literal["feed", "stage1-step", "stage2-step", "restore", "shard", "score", "plan", "seal", "select", "resume"]
SCHEMA_VERSION = 1
PACKAGES = ("torch", "numpy", "pillow", "opencv-python-headless", "webdataset", "pyiqa", "spandrel")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison and what is expected of it."""

    module: str
    """Where its function ``run`` is, below ``pipeline.bench``."""
    function: str = "run"
    against: str
    """What the peer is."""
    target: float
    """Ratio that is wanted on a CPU."""
    target_cuda: float | None = None
    """Ratio that is wanted on a GPU; None: the row has no GPU side."""
    defaults: dict[str, Any]
    """Options that the row knows, with the values for two CPU cores."""


ROWS: dict[Name, Row] = {
    "feed": Row(
        module="feed",
        against="tests/bench/feed.py: the published OpenCV chain, one picture at a time",
        target=5.0,
        defaults={"runs": 5, "threads": 1, "count": 32, "size": 512, "batch": 8, "source": "jpeg"},
    ),
    "stage1-step": Row(
        module="steps",
        function="stage1",
        against="tests/bench/stage1.py: two gradients at the last layer for the adaptive weight, then a backward",
        target=1.07,
        target_cuda=2.0,
        defaults={"runs": 5, "threads": 0, "batch": 1, "preset": "small128"},
    ),
    "stage2-step": Row(
        module="steps",
        function="stage2",
        against="tests/bench/stage2.py: codes by the encoder of stage 1 and a decoder pass in every step",
        target=1.8,
        target_cuda=3.0,
        defaults={"runs": 5, "threads": 0, "batch": 1, "preset": "mid256"},
    ),
    "restore": Row(
        module="restore",
        against="spandrel's CodeFormer with the same weights",
        target=1.3,
        target_cuda=3.0,
        defaults={"runs": 3, "threads": 0, "count": 1},
    ),
    "shard": Row(
        module="shard",
        against="webdataset.ShardWriter after a full decode by Pillow",
        target=1.5,
        defaults={"runs": 5, "threads": 0, "count": 400, "size": 512, "source": "jpeg"},
    ),
    "score": Row(
        module="score",
        against="pyiqa's metrics, called with each path",
        target=2.0,
        defaults={"runs": 3, "threads": 0, "count": 16, "size": 512, "source": "jpeg"},
    ),
    "plan": Row(
        module="plan",
        against="itself at the smallest number of inputs: 1 is linear",
        target=0.67,
        defaults={"runs": 2, "sizes": (10_000, 100_000, 1_000_000)},
    ),
    "seal": Row(
        module="rows",
        function="run_seal",
        against="itself at the smallest number of samples: 1 is linear",
        target=0.67,
        defaults={"runs": 2, "sizes": (10_000, 100_000, 1_000_000)},
    ),
    "select": Row(
        module="rows",
        function="run_select",
        against="itself at the smallest number of samples: 1 is linear",
        target=0.67,
        defaults={"runs": 2, "sizes": (10_000, 100_000, 1_000_000)},
    ),
    "resume": Row(
        module="resume",
        against="tests/bench/resume.py: one question for each unit",
        target=1.0,
        defaults={"runs": 3, "count": 10_000},
    ),
}
OPTIONS = ("runs", "threads", "count", "size", "batch", "preset", "source", "sizes")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Which row is run, and how large."""

    POSITIONAL: ClassVar[str] = "name"

    name: Name
    """Row; may stand alone as the first argument."""
    json: bool = False
    """Nothing but the JSON object; without it people get a few lines on stderr."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run; auto: cuda where there is one and the row has a GPU side."""
    runs: int | None = None
    """Times that each side is measured; the row's own number by default, as for all that follow."""
    threads: int | None = None
    """Threads of torch and OpenCV on both sides; 0: one a CPU."""
    count: int | None = None
    """Pictures (feed, restore, shard, score) or units (resume)."""
    size: int | None = None
    """Side of the pictures in pixels (feed, shard, score)."""
    batch: int | None = None
    """Pictures in a batch (feed, stage1-step, stage2-step)."""
    preset: str | None = None
    """Network (stage1-step, stage2-step)."""
    source: Source | None = None
    """How the pictures are stored (feed, shard, score): jpeg or png."""
    sizes: list[int] | None = None
    """Numbers of inputs or samples, rising (plan, seal, select)."""
    folder: str = ""
    """Folder in which a scratch folder is made; the system's by default."""

    def __post_init__(self) -> None:
        if self.name not in ROWS:
            raise UsageError(f"There is no row {self.name!r}.", f"Choose among {', '.join(get_args(Name))}.")
        row = ROWS[self.name]
        for option in OPTIONS:
            value = getattr(self, option)
            if value is None:
                continue
            if option not in row.defaults:
                raise UsageError(f"The row {self.name} has no option {option}.", f"It has: {', '.join(row.defaults)}.")
            if isinstance(value, int) and value < (0 if option == "threads" else 1):
                raise UsageError(f"{option} {value} is too small.")
        if self.sizes is not None and (len(self.sizes) < 2 or sorted(set(self.sizes)) != self.sizes):
            raise UsageError(f"sizes {self.sizes} are not two or more rising numbers.")
        if self.device == "cuda" and row.target_cuda is None:
            raise UsageError(f"The row {self.name} has no GPU side.", "Leave device out.")


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What was measured; rates, so higher is better."""

    name: str
    ours: float
    """Median rate."""
    peer: float
    """Median rate."""
    ratio: float
    unit: str
    runs: int
    spread: dict[str, float]
    """Of each side: distance between the quartiles over the median."""
    target: float
    """Ratio that the design wants on this device."""
    reached: bool
    """Whether the ratio and every other demand of the row are met."""
    missed: list[str]
    """Other demands that are not."""
    against: str
    """What the peer is."""
    checked: dict[str, float]
    """What was found equal before the clock ran, and how far it differed."""
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


def bench(config: BenchConfig) -> BenchResult:
    """Measure one row: equal results first, then the clock, both sides in turn.

    Raises:
        UsageError: an option that the row does not have, or a package that it needs is missing.
        VerificationError: the two sides do not give the same; there is no ratio then.
    """
    row = ROWS[config.name]
    device = _device(config, row)
    asked = {option: getattr(config, option) for option in OPTIONS if getattr(config, option) is not None}
    settings = {**row.defaults, **asked}
    if "threads" in settings:
        settings["threads"] = settings["threads"] or os.cpu_count() or 1
    if "sizes" in settings:
        settings["sizes"] = tuple(settings["sizes"])
    run: Callable[[Options], Measured] = getattr(import_module(f"pipeline.bench.{row.module}"), row.function)
    with tempfile.TemporaryDirectory(prefix="iqpir-bench-", dir=config.folder or None) as folder:
        measured = run(Options(**{"threads": 1, **settings, "folder": Path(folder), "device": device}))
    target = row.target if device == "cpu" or row.target_cuda is None else row.target_cuda
    result = _result(config.name, row, measured, target, {**settings, "device": device})
    if not config.json:
        show(result)
    return result


def show(result: BenchResult) -> None:
    """The row for people, on stderr."""
    console = Console(file=sys.stderr, highlight=False)
    console.print(f"{result.name}: ours {result.ours:.4g}, peer {result.peer:.4g} {result.unit} ({result.against})")
    verdict = "reached" if result.reached else "missed"
    console.print(f"ratio {result.ratio:.2f}, wanted {result.target:g}: {verdict}; {result.runs} runs a side")
    console.print(f"spread {result.spread}; compared: {result.checked}; {result.facts}")
    for line in result.missed:
        console.print(f"missed: {line}")


def _result(name: str, row: Row, measured: Measured, target: float, settings: dict[str, Any]) -> BenchResult:
    ours, peer = sorted(measured.ours), sorted(measured.peer)
    return BenchResult(
        name=name,
        ours=_rounded(_median(ours)),
        peer=_rounded(_median(peer)),
        ratio=_rounded(measured.ratio),
        unit=measured.unit,
        runs=len(ours),
        spread={"ours": _rounded(spread(ours)), "peer": _rounded(spread(peer))},
        target=target,
        reached=measured.ratio >= target and not measured.missed,
        missed=list(measured.missed),
        against=row.against,
        checked={what: _rounded(value) for what, value in measured.checked.items()},
        settings=settings,
        facts=measured.facts,
        machine=_machine(settings["device"]),
    )


def _device(config: BenchConfig, row: Row) -> str:
    if row.target_cuda is None or config.device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if config.device == "cuda":
        raise UsageError("This machine has no CUDA device.", "Leave --device out.")
    return "cpu"


def _machine(device: str) -> dict[str, Any]:
    """Processor, cores and versions: what a number means nothing without."""
    found: dict[str, Any] = {"cpu": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    load = os.getloadavg()[0]
    found["load_1min"] = round(load, 2)
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    installed = {name: _version(name) for name in PACKAGES}
    return {**found, "versions": {name: version for name, version in installed.items() if version}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
