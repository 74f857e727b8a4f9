"""The one adapter to pyiqa's no-reference metrics: facts, weights without a network, and a plain scorer.

pyiqa downloads a missing weight file while it builds a metric. Here that is an error, or, with a mirror, a
checked copy: a thousand workers must not fetch from a public server in secret.
"""

import importlib
import io
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iqpir.errors import UsageError
from pipeline.metrics.niqe_model import Niqe, load_pristine_model
from pipeline.metrics.small_pictures import Enlargement
from pipeline.metrics.weights import Weights, without_network
from pipeline.storage import Storage
from pipeline.torchvision_ops import ensure_torchvision_operators

LICENCE = "pyiqa: PolyForm-Noncommercial-1.0.0 and NTU S-Lab 1.0 (non-commercial); weights may add their own"
NIQE_MODEL = Path(__file__).parent / "niqe_pristine.mat"
DEFAULT_MIN_SIDE = 224
"""Side to which pictures are enlarged for pyiqa's networks, which see 224 pixels and more in training."""

_SEED = 123
_NOT_OF_ONE_PICTURE = ("fid", "fid_dinov2", "sfid", "inception_score", "clipscore")
_NO_GRADIENT = ("brisque", "entropy", "ilniqe", "niqe", "nrqm", "pi", "piqe", "qalign", "compare2score")
_PER_PICTURE = ("piqe", "niqe", "niqe_matlab", "entropy")


@dataclass(frozen=True, kw_only=True)
class PyiqaFacts:
    """What the registry needs to know about a pyiqa metric."""

    lower_better: bool
    differentiable: bool
    batchable: bool
    score_range: tuple[float, float] | None = None
    min_side: int = DEFAULT_MIN_SIDE
    enlargement: Enlargement = "bicubic"


EMBEDDED: Mapping[str, PyiqaFacts] = {
    "piqe": PyiqaFacts(lower_better=True, differentiable=False, batchable=True, score_range=(0.0, 100.0), min_side=16),
    "niqe": PyiqaFacts(
        lower_better=True,
        differentiable=False,
        batchable=True,
        score_range=(0.0, 100.0),
        min_side=96,
        enlargement="mirror",
    ),
}
"""pyiqa metrics that need no download; known without importing pyiqa."""


def version() -> str:
    """The installed version of pyiqa, or ``absent``."""
    try:
        return metadata.version("pyiqa")
    except metadata.PackageNotFoundError:
        return "absent"


def no_reference_metrics() -> dict[str, PyiqaFacts]:
    """Facts of each no-reference metric of the installed pyiqa, by pyiqa's name; none without pyiqa."""
    if util.find_spec("pyiqa") is None:
        return {}
    configs: Mapping[str, Mapping[str, Any]] = _pyiqa("pyiqa.default_model_configs").DEFAULT_CONFIGS
    return {
        name: PyiqaFacts(
            lower_better=bool(config.get("lower_better", False)),
            differentiable=not name.startswith(_NO_GRADIENT),
            batchable=name in _PER_PICTURE,
            score_range=_range(str(config.get("score_range", ""))),
        )
        for name, config in configs.items()
        if config.get("metric_mode") == "NR" and name not in _NOT_OF_ONE_PICTURE
    }


def build(name: str, device: str | torch.device, weights_uri: str | None = None) -> "PyiqaScorer":
    """A pyiqa metric ready to score.

    Args:
        name: pyiqa's name.
        device: where it runs.
        weights_uri: folder or URL with weight files and their ``SHA256SUMS``; files are copied from there
            into the caches where libraries look. Without it only those are looked at.

    Raises:
        UsageError: pyiqa, a package it needs or a weight file is missing (naming it and its place), or a
            file of the mirror or of a cache is not what the mirror's sum says.
    """
    if util.find_spec("pyiqa") is None:
        raise UsageError(f"Metric {name!r} needs pyiqa.", "Install the extra: pip install iqpir[iqa].")
    pyiqa = _pyiqa("pyiqa")
    if name == "niqe":
        return PyiqaScorer(Niqe(load_pristine_model(NIQE_MODEL)).to(device), torch.device(device))
    weights = Weights(name, Storage.open(weights_uri) if weights_uri else None)
    download_util, hub = _pyiqa("pyiqa.utils.download_util"), Path(torch.hub.get_dir())
    caches = (Path(download_util.DEFAULT_CACHE_DIR), hub / "checkpoints", hub / "clip", Path.home() / ".cache" / "clip")
    # What pyiqa prints here is that it downloads, which it does not.
    with weights.checking(caches), without_network(weights, download_util), redirect_stdout(io.StringIO()):
        try:
            metric = pyiqa.create_metric(name, device=torch.device(device))
        except ImportError as error:
            raise UsageError(f"Metric {name!r} needs a package that is missing: {error}.") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise weights.hub_error() or UsageError(
                f"Metric {name!r} cannot be built: {' '.join(str(error).split())[:300]}.",
                "Missing weights belong in the cache of Hugging Face (HF_HOME) or torch (TORCH_HOME).",
            ) from error
    return PyiqaScorer(metric.net, torch.device(device))


class PyiqaScorer(nn.Module):
    """A pyiqa network as a function of pictures; one that draws random crops draws the same each time."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.device = device

    def forward(self, pictures: Tensor) -> Tensor:
        """[B,3,H,W] in [0,1] -> [B]; higher or lower is better, as the metric's direction says."""
        devices = [self.device] if self.device.type == "cuda" else []
        before = np.random.get_state()  # noqa: NPY002  (pyiqa draws from the global generator)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            np.random.seed(_SEED)  # noqa: NPY002
            try:
                output = self.net(pictures.to(self.device))
            finally:
                np.random.set_state(before)  # noqa: NPY002
        score: Tensor = output[0] if isinstance(output, tuple) else output
        return score.reshape(len(pictures))


def _pyiqa(module: str) -> Any:
    """A module of pyiqa, imported late (it takes seconds), quiet, and told to stay offline."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[variable] = "1"
    ensure_torchvision_operators()
    with redirect_stdout(sys.stderr):
        found = importlib.import_module(module)
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    return found


def _range(text: str) -> tuple[float, float] | None:
    """pyiqa's range, such as ``~0, ~100``, as numbers; None where an end is open."""
    parts = [part.strip().lstrip("~") for part in text.split(",")]
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        return None
    return (low, high) if low < high else None
