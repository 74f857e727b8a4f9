"""Ablations: variants of a recipe, each trained from several seeds and judged on the same held-back pictures.

A run is stage 1 (shared by variants that do not change it), its codes, stage 2 and an evaluation, each by
the verb that its job runs. A run leaves a row; a row that is there is not made again, unless code, data or
settings are others by now. Table and figures are made from all rows.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from iqpir.config import digest
from iqpir.errors import UsageError
from pipeline.ablations.charts import figures
from pipeline.ablations.row import Row, read_row, row_of, write_row
from pipeline.ablations.table import jsonl, tables
from pipeline.command import workspace
from pipeline.corpus import Corpus
from pipeline.curate import CurateConfig, curate
from pipeline.demo import RECIPES, Steps, scikit_image_pictures
from pipeline.encode import EncodeConfig, encode
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.label import LabelConfig, label
from pipeline.register import git_commit
from pipeline.score import ScoreConfig, score
from pipeline.shard import ShardConfig, shard
from pipeline.stage1 import Stage1Training, train_stage1
from pipeline.stage2 import Stage2Training, train_stage2
from pipeline.storage import Storage
from pipeline.tracking.runs import tracking_location
from pipeline.view import read_view

log = logging.getLogger(__name__)
DATA = ("shard", "score", "label", "curate")
TRAINED = ("stage1", "encode", "stage2", "evaluate")
"""Sections of the recipe that decide a row, after those of the data."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs from the recipe, by dotted name of the setting."""

    says: str
    """A few words for the table."""
    stage1: dict[str, Any] = field(default_factory=dict)
    """Settings of stage 1; variants that agree here share one stage 1 for each seed."""
    stage2: dict[str, Any] = field(default_factory=dict)
    """Settings of stage 2."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Settings of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two variants whose difference answers a question."""

    first: str
    """Variant that is subtracted from."""
    second: str
    """Variant that is subtracted."""


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Which variants are trained from which seeds, and what is compared."""

    variants: dict[str, Variant]
    """Name -> what differs from the recipe."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Question -> two variants; their differences are taken seed by seed."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Of weights, order, flips, degradations and wishes; two or more, for an interval."""
    outside: list[str] = field(default_factory=lambda: ["piqe", "niqe"])
    """Metrics that no variant has in its loss; their mean is the quality that counts."""
    charted: list[str] = field(default_factory=list)
    """Variants in the figures; all by default."""
    input: str = ""
    """Folder or URL of pictures; the colour pictures in scikit-image's package by default."""
    folder: str = field(default_factory=lambda: f"{workspace()}/ablation")
    """Folder for corpus, runs and rows."""
    output: str = ""
    """Folder for table, figures and rows to keep; ``folder``/results by default."""
    recipe: str = str(RECIPES / "ablation_tiny.yaml")
    """Settings of every step."""
    tracking_uri: str = ""
    """MLflow server or database; ``folder``'s mlflow.db by default."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"seeds {self.seeds}: an interval needs two different ones or more.")
        named = {name for pair in self.comparisons.values() for name in (pair.first, pair.second)} | set(self.charted)
        unknown = sorted(named - self.variants.keys())
        if unknown or not self.variants:
            raise UsageError(f"There is no variant {unknown or 'at all'}.", f"Known: {', '.join(self.variants)}.")
        if not self.outside:
            raise UsageError("outside names no metric.", "Name one that no variant has in its loss.")


@dataclass(frozen=True)
class AblationResult:
    """Where the table is, and what is in it."""

    output: str
    runs: int
    skipped: int
    """Runs whose row was there."""
    seconds: float


@dataclass(frozen=True)
class Data:
    """What every run starts from."""

    corpus: str
    view: str
    training: dict[str, float]
    """Mean quality, and mean calibrated score of each metric, of the training pictures."""
    digest: str


def ablation(config: AblationConfig) -> AblationResult:
    """Make the missing runs, then the table and the figures of all.

    Raises:
        UsageError: a section of the recipe is missing, or a run's name is taken by other settings.
        IqpirError: what a step raised.
    """
    started = time.monotonic()
    sections, code = _sections(config.recipe), code_digest()
    data = prepare(config)
    folder = Storage.open(config.folder)
    rows, skipped = [], 0
    for seed in config.seeds:
        for name, variant in config.variants.items():
            identity = digest([code, data.digest, sections, asdict(variant), seed, config.outside], 16)
            row = read_row(folder, name, seed)
            if row is not None and row.identity == identity:
                skipped += 1
            else:
                row = replace(_run(config, data, name, variant, seed, code), identity=identity)
                write_row(folder, row)
            rows.append(row)
            log.info("%d of %d runs", len(rows), len(config.seeds) * len(config.variants))
    output = Storage.open(config.output or f"{config.folder}/results")
    for path, text in _report(rows, config).items():
        output.publish(path, text.encode())
    return AblationResult(output.url, len(rows), skipped, round(time.monotonic() - started, 1))


def prepare(config: AblationConfig) -> Data:
    """Corpus, labels and view, as the recipe says; what is done already is not done again."""
    pictures = config.input or scikit_image_pictures(f"{config.folder}/pictures")
    corpus = f"{config.folder}/corpus"
    steps = Steps(config.recipe)
    steps.run(shard, ShardConfig, input=pictures, corpus=corpus)
    steps.run(score, ScoreConfig, corpus=corpus)
    labelled = steps.run(label, LabelConfig, corpus=corpus)
    reference = steps.run(curate, CurateConfig, corpus=corpus).view
    view = read_view(Corpus(corpus), reference)
    table = view.split("train")
    means = {"quality": float(np.nanmean(table["quality"].to_numpy()))}
    for metric in view.facts["metrics"]:
        means[metric] = float(np.nanmean(table[f"iqa_{metric}_cal"].to_numpy()))
    return Data(corpus, reference, means, digest([view.digest, labelled.calibration_digest], 16))


def _sections(recipe: str) -> dict[str, Any]:
    """The recipe's sections that decide what a run gives."""
    values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    missing = [name for name in (*DATA, *TRAINED) if name not in values]
    if missing:
        raise UsageError(f"The recipe {recipe} has no section {', '.join(missing)}.", "Give it one of each.")
    return {name: values[name] for name in ("all", *TRAINED) if name in values}


def code_digest() -> str:
    """8 hex digits over the files of both packages, weights included: what else decides a row than data and settings.

    Not the commit, which changes with a document, and does not with a file that is not committed.
    """
    found = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in ("iqpir", "pipeline"):
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".safetensors"):
                found.update(f"{path.relative_to(root).as_posix()}\0".encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:8]


def _run(config: AblationConfig, data: Data, name: str, variant: Variant, seed: int, code: str) -> Row:
    """Train and evaluate one variant from one seed; a run of other code has another name, and is not gone on with."""
    started = time.monotonic()
    steps = Steps(config.recipe)
    training = {
        "corpus": data.corpus,
        "view": data.view,
        "runs": f"{config.folder}/runs",
        "tracking_uri": config.tracking_uri or tracking_location("", config.folder),
        "seed": str(seed),
    }
    shared = f"stage1-{digest(variant.stage1, 6)}-{seed}-{code}"
    stage1 = steps.run(train_stage1, Stage1Training, **training, name=shared, **_flags(variant.stage1)).run
    steps.run(encode, EncodeConfig, corpus=data.corpus, stage1=stage1)
    settings = {**training, "name": f"{name}-{seed}-{code}", "stage1": stage1, **_flags(variant.stage2)}
    stage2 = steps.run(train_stage2, Stage2Training, **settings).run
    found = {name: training[name] for name in ("corpus", "view", "tracking_uri")} | {"checkpoint": stage2}
    evaluated = steps.run(evaluate, EvaluateConfig, **found, **_flags(variant.evaluate))
    row = row_of(evaluated, config.outside)
    return replace(
        row,
        variant=name,
        seed=seed,
        commit=git_commit().get("git_commit", "no repository"),
        machine=_machine(),
        settings=asdict(variant),
        training=data.training,
        step_seconds=steps.seconds,
        seconds=round(time.monotonic() - started, 1),
    )


def _flags(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as the values of flags: JSON, which is YAML."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def _machine() -> dict[str, str]:
    """What the numbers were computed on."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _report(rows: list[Row], config: AblationConfig) -> dict[str, str]:
    """File name -> text of everything that is kept."""
    says = {name: variant.says for name, variant in config.variants.items()}
    pairs = {question: (pair.first, pair.second) for question, pair in config.comparisons.items()}
    charts = figures(rows, config.charted or list(says))
    return {
        "ablation.jsonl": jsonl(rows),
        **{f"ablation-{name}.svg": text for name, text in charts.items()},
        "ablation.md": tables(rows, says, pairs, config.outside),
    }
