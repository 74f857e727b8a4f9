"""Stage 1 learns from a .beton exactly what it learns from the tars."""

import json
from pathlib import Path

import pytest

pytest.importorskip("ffcv", reason="ffcv (extra `export`, needs Debian's libopencv-dev) is not installed")

from pipeline.export import ExportConfig, export
from pipeline.stage1 import train_stage1
from pipeline.training.feed import FeedConfig
from tests.chain import Chain

pytestmark = pytest.mark.slow


def test_stage1_trains_from_an_exported_beton(chain: Chain, tmp_path: Path) -> None:
    beton = tmp_path / "train.beton"
    export(ExportConfig(corpus=chain.data.corpus, view=chain.data.view, output=str(beton), size=32, mode="raw"))
    feed = FeedConfig(kind="ffcv", beton=str(beton))
    result = train_stage1(chain.data.stage1("from-beton", feed=feed))
    assert (result.status, result.step) == ("done", 12)
    digests = [
        json.loads((Path(run.checkpoint) / "config.json").read_text())["metadata"]["weights_digest"]
        for run in (result, chain.stage1)
    ]
    assert digests[0] == digests[1]
