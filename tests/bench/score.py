"""The loop of pyiqa's own documentation: build each metric, call it with the path of each picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyiqa
import torch
from pyiqa.utils.img_util import imread2tensor
from torch import Tensor


def load(names: Sequence[str], niqe_model: str, networks: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Any]:
    """Metrics by name, on the CPU; ``niqe`` with the pristine model at ``niqe_model``, so that nothing is fetched.

    ``networks``, [B,3,H,W] in [0,1] -> [B], are called as pyiqa calls its own: with one picture, read from its path.
    """
    options = {"niqe": {"pretrained_model_path": niqe_model}}
    device = torch.device("cpu")
    known = {name: pyiqa.create_metric(name, device=device, **options.get(name, {})) for name in names}
    return known | {name: _of_a_path(network) for name, network in networks.items()}


def _of_a_path(network: Callable[[Tensor], Tensor]) -> Callable[[str], Tensor]:
    def metric(path: str) -> Tensor:
        with torch.no_grad():
            return network(imread2tensor(path, rgb=True)[None])

    return metric


def scores(metrics: dict[str, Any], paths: Sequence[Path]) -> dict[str, list[float]]:
    """name -> a score for each path."""
    return {name: [float(metric(str(path))) for path in paths] for name, metric in metrics.items()}
