"""The loop of pyiqa's own documentation: build each metric, call it with the path of each picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyiqa
import torch


def load(names: Sequence[str], niqe_model: str) -> dict[str, Any]:
    """Metrics by name, on the CPU; ``niqe`` with the pristine model at ``niqe_model``, so that nothing is fetched."""
    options = {"niqe": {"pretrained_model_path": niqe_model}}
    return {name: pyiqa.create_metric(name, device=torch.device("cpu"), **options.get(name, {})) for name in names}


def scores(metrics: dict[str, Any], paths: Sequence[Path]) -> dict[str, list[float]]:
    """name -> a score for each path."""
    return {name: [float(metric(str(path))) for path in paths] for name, metric in metrics.items()}
