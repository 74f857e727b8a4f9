"""Metrics of another package, found through their entry points, whose behaviour is a file that a test may change.

``colour`` reads its weights from one. ``moody`` scores the mean of a picture, or does what its mood says.
"""

import sys
from pathlib import Path

import pytest

from pipeline.scoring.score_unit import load_metric

_SOURCE = """
import json
from pathlib import Path

import torch
from pipeline.metrics import Metric


class Weighted(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.weights = torch.tensor(json.loads(path.read_text()))

    def forward(self, pictures):
        means = pictures.mean((2, 3)) - 0.5
        return (means * self.weights).sum(1) + pictures.std((1, 2, 3))


METRIC = Metric(
    name="colour", version="1", direction="higher", differentiable=True, licence="CC0", commercial=True,
    batchable=True, scorer=lambda device, weights_uri=None: Weighted(Path(__file__).parent / "colour.json").to(device),
)
"""

_MOODY = """
import builtins
from pathlib import Path

import torch
from pipeline.metrics import Metric


class Moody(torch.nn.Module):
    def forward(self, pictures):
        mood, _, above = (Path(__file__).parent / "mood").read_text().partition(" ")
        means = pictures.mean((1, 2, 3))
        if mood and bool((means > float(above or 0)).any()):
            raise getattr(builtins, mood)("as its mood says")
        return means


METRIC = Metric(
    name="moody", version="1", direction="higher", differentiable=True, licence="CC0", commercial=True,
    batchable=True, scorer=lambda device, weights_uri=None: Moody().to(device),
)
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the metric ``colour`` known; its weights are ``[1, 1, 1]``."""
    _install("colour", _SOURCE, folder, monkeypatch)
    set_weights(folder, [1.0, 1.0, 1.0])


def install_moody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the metric ``moody`` known; it is in no mood."""
    _install("moody", _MOODY, folder, monkeypatch)
    set_mood(folder, "")


def set_mood(folder: Path, mood: str) -> None:
    """``moody`` raises the built-in error of that name: "TypeError", or "TypeError 0.4" for means above 0.4 only."""
    (folder / "mood").write_text(mood)


def _install(name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    module = f"{name}_metric"
    monkeypatch.delitem(sys.modules, module, raising=False)
    (folder / f"{module}.py").write_text(source)
    information = folder / f"{name}-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[iqpir.metrics]\n{name} = {module}:METRIC\n")
    monkeypatch.syspath_prepend(str(folder))
    load_metric.cache_clear()


def set_weights(folder: Path, weights: list[float]) -> None:
    """Other weights, and a process that has loaded none, as the next job's is."""
    (folder / "colour.json").write_text(str(weights))
    load_metric.cache_clear()
