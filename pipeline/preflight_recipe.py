"""What ``pipeline.preflight`` checks of a recipe: each section is understood by its job, and what it needs is there."""

import importlib
from typing import Any

from pipeline.command import parse
from pipeline.preflight_checks import check_cluster, check_metrics, check_network
from pipeline.score import ScoreConfig
from pipeline.stage1 import Stage1Training
from pipeline.stage2 import Stage2Training
from pipeline.stage3 import Stage3Training
from pipeline.training.config import Training
from pipeline.training.perceptual import perceptual_term


def config_type_of(job: str) -> type[Any]:
    """The class of a job's configuration: ``<Job>Training`` or else ``<Job>Config`` beside its verb."""
    module = importlib.import_module("pipeline.bench.bench" if job == "bench" else f"pipeline.{job}")
    words = "".join(word.capitalize() for word in job.split("_"))
    found: type[Any] = getattr(module, f"{words}Training", None) or getattr(module, f"{words}Config")
    return found


def check_section(recipe: str, job: str, *, cluster: bool) -> str:
    """A section is a configuration of its job; metrics and perceptual term are at hand, workers have room.

    Args:
        recipe: path of the recipe.
        job: name of the section.
        cluster: whether trainings on Ray are checked for room.

    Raises:
        UsageError: the first thing that is not so.
    """
    config = parse(config_type_of(job), ["--config", recipe], job)
    found = ["understood"]
    if isinstance(config, ScoreConfig):
        found.append(check_metrics(config.metrics, config.weights_uri))
    if isinstance(config, Training):
        found += _of_training(config)
        if cluster and config.launcher == "ray":
            found.append(check_cluster(config.workers))
    return "; ".join(found)


def _of_training(config: Training) -> list[str]:
    found = [check_network(config.preset, config.network)]
    if isinstance(config, Stage1Training | Stage3Training):
        perceptual_term(config.perceptual, config.stage.perceptual_weight)
        found.append(f"perceptual term {config.perceptual}")
    if isinstance(config, Stage2Training) and config.stage.quality_weight > 0:
        found.append(check_metrics(config.prior, ""))
    return found
