"""The whole chain on one machine, in the order one reads it: pictures in, a registered model and a report out.

Each step is the verb that a cluster runs, with the settings of one recipe; what an earlier demo finished is
not done again.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from iqpir.errors import UsageError
from pipeline.command import parse, workspace
from pipeline.curate import CurateConfig, curate
from pipeline.encode import EncodeConfig, encode
from pipeline.evaluate import EvaluateConfig, EvaluateResult, evaluate
from pipeline.label import LabelConfig, label
from pipeline.register import RegisterConfig, register
from pipeline.report import ReportConfig, report
from pipeline.restore import RestoreConfig, restore
from pipeline.score import ScoreConfig, score
from pipeline.shard import ShardConfig, shard
from pipeline.stage1 import Stage1Training, train_stage1
from pipeline.stage2 import Stage2Training, train_stage2
from pipeline.stopping import StoppedError
from pipeline.storage import Storage
from pipeline.tracking.runs import reachable, tracking_location
from pipeline.verify import VerifyConfig, verify

log = logging.getLogger(__name__)
PICTURES = [
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "color.png",
]
"""Colour pictures in scikit-image's package. motorcycle_right.png is left out: it shows the same scene as
motorcycle_left.png, and the two could end on both sides of the split."""
SHOWN = (0.1, 0.5)
"""Settings of the dial in the closing table, beside the one of the headline figures."""
LEAST_SPEARMAN, LEAST_RANGE = 0.9, 0.08
"""Of requested against measured quality, and of measured quality from end to end: what the demo is to show."""
RECIPES = Path(__file__).resolve().parent.parent / "jobs" / "recipes"
C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo runs on, and where it works."""

    input: str = ""
    """Folder or URL of pictures; the colour pictures in scikit-image's package by default."""
    folder: str = field(default_factory=lambda: f"{workspace()}/demo")
    """Folder for everything the demo makes."""
    recipe: str = str(RECIPES / "tiny32.yaml")
    """Settings of every step."""
    tracking_uri: str = ""
    """MLflow server or database; $MLFLOW_TRACKING_URI or ``folder``'s mlflow.db by default."""


@dataclass(frozen=True)
class DemoResult:
    """What the last line of stdout holds."""

    quality: dict[str, float]
    dial: list[list[float]]
    dial_spearman: float
    dial_range: float
    psnr: dict[str, float]
    model_uri: str
    tracking_uri: str
    corpus: str
    report: str
    restored: str
    missed: list[str]
    """What the demo is to show and this one did not; empty if it did."""
    skipped: dict[str, str]
    """Steps that an earlier demo had finished, and what of them."""
    step_seconds: dict[str, float]
    seconds: float


class Steps:
    """Runs verbs with the recipe's settings, and remembers how long each took and what it skipped."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.seconds: dict[str, float] = {}
        self.skipped: dict[str, str] = {}

    def run(self, verb: Callable[[C], R], config_type: type[C], **flags: str) -> R:
        """Run ``verb`` with its section of the recipe and ``flags`` over it."""
        job = verb.__name__.removeprefix("train_")
        argv = ["--config", self.recipe]
        for name, value in flags.items():
            argv += [f"--{name}", value]
        log.info("== %s", job)
        started = time.monotonic()
        result = verb(parse(config_type, argv, job))
        if getattr(result, "status", "") == "stopped":  # what follows needs it whole
            raise StoppedError(f"{job} was stopped.", "The same command goes on from there.")
        self.seconds[job] = round(time.monotonic() - started, 1)
        skipped = _skipped(vars(result))
        if skipped:
            self.skipped[job] = skipped
            log.info("%s: skipped %s, done earlier", job, skipped)
        return result


def _skipped(result: Mapping[str, Any]) -> str:
    """What a result says was done earlier, or nothing."""
    if result.get("status") == "done earlier":
        return f"all {result['step']} steps"
    if result.get("created") is False:
        return "registration of the same version"
    for name, unit in (("skipped_units", "units"), ("skipped", "pictures")):
        if result.get(name):
            return f"{result[name]} {unit}"
    return ""


def demo(config: DemoConfig) -> DemoResult:
    """Run shard, score, label, curate, stage 1, encode, stage 2, evaluate, register, restore and report.

    Raises:
        IqpirError: what the first failing step raised.
    """
    started = time.monotonic()
    pictures = config.input or scikit_image_pictures(f"{config.folder}/pictures")
    corpus = f"{config.folder}/corpus"
    tracking = tracking_location(config.tracking_uri, config.folder)
    steps = Steps(config.recipe)
    steps.run(shard, ShardConfig, input=pictures, corpus=corpus)
    reachable(tracking)  # known before minutes of work; after the pictures are known to be there
    steps.run(score, ScoreConfig, corpus=corpus)
    steps.run(label, LabelConfig, corpus=corpus)
    view = steps.run(curate, CurateConfig, corpus=corpus).view
    training = {"corpus": corpus, "view": view, "runs": runs_of(config.folder, view), "tracking_uri": tracking}
    stage1 = steps.run(train_stage1, Stage1Training, **training).run
    steps.run(encode, EncodeConfig, corpus=corpus, stage1=stage1)
    stage2 = steps.run(train_stage2, Stage2Training, **training, stage1=stage1)
    evaluated = steps.run(
        evaluate,
        EvaluateConfig,
        corpus=corpus,
        view=view,
        checkpoint=stage2.run,
        further=str([*SHOWN]),
        tracking_uri=tracking,
    )
    version = steps.run(
        register,
        RegisterConfig,
        checkpoint=stage2.run,
        evaluation=f"{evaluated.output}/evaluation.json",
        tracking_uri=tracking,
    )
    restored = steps.run(
        restore,
        RestoreConfig,
        model=version.model_uri,
        input=f"{evaluated.output}/lq",
        output=f"{config.folder}/restored",
        tracking_uri=tracking,
    )
    page = steps.run(
        report,
        ReportConfig,
        corpus=corpus,
        view=view,
        evaluations=f"[{evaluated.output}]",
        output=f"{config.folder}/report.html",
    )
    steps.run(verify, VerifyConfig, corpus=corpus)
    show(evaluated, version.model_uri, page.output, tracking)
    return DemoResult(
        quality=evaluated.quality,
        dial=evaluated.dial,
        dial_spearman=evaluated.dial_spearman,
        dial_range=evaluated.dial_range,
        psnr=evaluated.psnr,
        model_uri=version.model_uri,
        tracking_uri=tracking,
        corpus=corpus,
        report=page.output,
        restored=restored.output,
        missed=shortfalls(evaluated),
        skipped=steps.skipped,
        step_seconds=steps.seconds,
        seconds=round(time.monotonic() - started, 1),
    )


def runs_of(folder: str, view: str) -> str:
    """Folder for the trainings on a view: names in the recipe are taken by those on the former version."""
    version = int(view.rpartition("@v")[2])
    return f"{folder}/runs" if version == 1 else f"{folder}/runs/v{version:04d}"


def scikit_image_pictures(folder: str) -> str:
    """Copy the colour pictures of scikit-image's package into ``folder``, and return it.

    Raises:
        UsageError: the package has none of them.
    """
    import skimage

    source = Path(skimage.__file__).parent / "data"
    present = [source / name for name in PICTURES if (source / name).is_file()]
    if not present:
        raise UsageError(f"{source} has no pictures.", "Name a folder: make demo INPUT=/a/folder.")
    target = Storage.open(folder)
    for path in present:
        if not target.exists(path.name):
            target.publish(path.name, path)
    return folder


def show(evaluated: EvaluateResult, model_uri: str, report_path: str, tracking_uri: str) -> None:
    """The closing table, for people, on stderr."""
    console = Console(file=sys.stderr)
    table = Table(title=f"{evaluated.samples} held-back pictures", title_justify="left")
    for column in ("", "quality", "PSNR, dB", "SSIM"):
        table.add_column(column, justify="left" if not column else "right")
    for name, text in (("lq", "degraded (LQ)"), ("hq", "original (HQ)")):
        table.add_row(text, f"{evaluated.quality[name]:.3f}", *_fidelity(evaluated, name))
    for row in evaluated.further:
        figures = f"{row['quality']:.3f}", f"{row['psnr']:.2f}", f"{row['ssim']:.3f}"
        table.add_row(f"restored, dial {row['requested']}", *figures)
    table.add_row("restored, dial 0.95", f"{evaluated.quality['restored']:.3f}", *_fidelity(evaluated, "restored"))
    console.print(table)
    console.print(
        f"dial: Spearman {evaluated.dial_spearman:.2f}, {evaluated.dial[0][1]:.3f} to {evaluated.dial[-1][1]:.3f}",
        highlight=False,
    )
    for reason in shortfalls(evaluated):
        console.print(f"not what the demo is to show: {reason}", highlight=False, soft_wrap=True)
    console.print(f"model: {model_uri}", highlight=False)
    console.print(f"report: {report_path}", highlight=False, soft_wrap=True)
    console.print(f"MLflow: .venv/bin/mlflow ui --backend-store-uri {tracking_uri}", highlight=False, soft_wrap=True)


def shortfalls(evaluated: EvaluateResult) -> list[str]:
    """What of the method's promise an evaluation does not show, a reason each. NaN shows nothing."""
    found = []
    lq, restored = evaluated.quality["lq"], evaluated.quality["restored"]
    if not restored > lq:
        found.append(f"restored pictures have the quality {restored:.3f}, degraded ones {lq:.3f}")
    if not evaluated.dial_spearman >= LEAST_SPEARMAN:
        found.append(f"the dial's Spearman correlation is {evaluated.dial_spearman:.2f}, below {LEAST_SPEARMAN}")
    if not evaluated.dial_range >= LEAST_RANGE:
        found.append(f"the dial moves quality by {evaluated.dial_range:.3f}, less than {LEAST_RANGE}")
    return found


def _fidelity(evaluated: EvaluateResult, name: str) -> tuple[str, str]:
    if name not in evaluated.psnr:
        return "", ""
    return f"{evaluated.psnr[name]:.2f}", f"{evaluated.ssim[name]:.3f}"
