"""A metric of another package, found through its entry point, whose weights are a file that a test may change."""

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


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the metric ``colour`` known; its weights are ``[1, 1, 1]``."""
    folder.mkdir()
    (folder / "colour_metric.py").write_text(_SOURCE)
    information = folder / "colour-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: colour\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[iqpir.metrics]\ncolour = colour_metric:METRIC\n")
    monkeypatch.syspath_prepend(str(folder))
    set_weights(folder, [1.0, 1.0, 1.0])


def set_weights(folder: Path, weights: list[float]) -> None:
    """Other weights, and a process that has loaded none, as the next job's is."""
    (folder / "colour.json").write_text(str(weights))
    load_metric.cache_clear()
