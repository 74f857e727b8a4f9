"""Each row of the benchmark runs, finds both sides equal, and prints the one JSON object that scripts rely on."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from iqpir.degradation.parameters import degradation_preset, sample_parameters, scaled
from iqpir.degradation.picture import degrade
from iqpir.degradation.reference import degrade as degrade_by_opencv
from iqpir.errors import UsageError, VerificationError
from pipeline.bench.bench import ROWS, BenchConfig
from pipeline.bench.measure import Measured, alternate, require_equal, spread
from pipeline.bench.peers import peer
from pipeline.bench.pictures import encoded, picture
from pipeline.command import run
from tests.conftest import draw_picture
from tests.jobs.scripts import job

TINY: dict[str, list[str]] = {
    "feed": ["--count", "5", "--size", "64", "--batch", "2", "--runs", "2"],
    "shard": ["--count", "6", "--size", "64", "--runs", "2", "--source", "png"],
    "plan": ["--sizes", "[20, 1100]", "--runs", "1"],
    "resume": ["--count", "50", "--runs", "2"],
}
SLOW: dict[str, list[str]] = {
    "seal": ["--sizes", "[20, 1100]", "--runs", "2"],
    "select": ["--sizes", "[200, 1100]", "--runs", "1"],
    "stage2-step": ["--preset", "tiny32", "--batch", "1", "--runs", "1", "--threads", "1"],
    "stage1-step": ["--preset", "tiny32", "--batch", "1", "--runs", "1", "--threads", "1"],
    "score": ["--count", "2", "--size", "224", "--runs", "1", "--threads", "1"],
    "restore": ["--runs", "1"],
}
CASES = [pytest.param(name, id=name) for name in TINY] + [
    pytest.param(name, id=name, marks=pytest.mark.slow) for name in SLOW
]


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """Rows set the number of threads of their process."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def test_every_row_is_tried_here() -> None:
    assert {*TINY, *SLOW} == set(ROWS)


@pytest.mark.parametrize("name", CASES)
def test_a_row_prints_one_json_object_with_the_agreed_keys(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = job("bench")
    arguments = [name, "--json", "--folder", str(tmp_path), "--device", "cpu", *{**TINY, **SLOW}[name]]
    assert run(script.verb, script.config_type, arguments, "bench") == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["name"] == name
    assert found["ratio"] == pytest.approx(found["ours"] / found["peer"], rel=2e-3)
    assert found["ours"] > 0 and found["unit"].endswith(("/s", " per core second"))
    assert found["runs"] == int(arguments[arguments.index("--runs") + 1])
    assert set(found["spread"]) == {"ours", "peer"}
    assert found["checked"], "nothing was compared"
    assert found["machine"]["cpu"] and found["machine"]["versions"]["torch"]
    assert not list(tmp_path.iterdir())


def test_an_option_that_the_row_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="feed has no option preset"):
        BenchConfig(name="feed", preset="tiny32")
    with pytest.raises(UsageError, match="no GPU side"):
        BenchConfig(name="plan", device="cuda")
    with pytest.raises(UsageError, match="rising"):
        BenchConfig(name="plan", sizes=[100, 10])


def test_unequal_sides_get_no_ratio() -> None:
    checked: dict[str, float] = {}
    require_equal(checked, "difference", 0.01, 0.02)
    assert checked == {"difference": 0.01}
    for difference in (0.03, float("nan")):
        with pytest.raises(VerificationError, match="Nothing was measured"):
            require_equal(checked, "difference", difference, 0.02)


def test_sides_take_turns_and_rates_are_work_per_second() -> None:
    order: list[str] = []
    ours, theirs = alternate(lambda: order.append("ours"), lambda: order.append("peer"), 10, 3)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert len(ours) == len(theirs) == 3 and min(*ours, *theirs) > 0
    assert Measured(ours=[1.0, 4.0, 3.0], peer=[2.0, 1.0, 1.5], unit="x/s", checked={}).ratio == 2.0
    assert spread([5.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_pictures_are_real_ones_and_the_same_each_time() -> None:
    one, again, other = picture(3, 96), picture(3, 96), picture(11, 96)
    assert one.shape == (96, 96, 3) and one.dtype == np.uint8
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert encoded(one, "jpeg") == encoded(again, "jpeg")


@pytest.mark.parametrize(("name", "side"), [("faces", 256), ("natural", 96), ("tiny32", 32)])
def test_the_peer_of_feed_is_an_oracle_of_both_degradations(name: str, side: int) -> None:
    classic = peer("feed")
    config = scaled(degradation_preset(name), side)
    for number in range(6):
        hq = draw_picture(number, side)
        parameters = sample_parameters(config, 1, 0, number)
        wanted = classic.degrade(hq[..., ::-1].astype(np.float32) / 255, parameters)[..., ::-1] * 255
        assert np.abs(degrade_by_opencv(hq, parameters) - wanted).mean() < 0.3
        assert np.abs(degrade(hq, parameters) - wanted).mean() < 1.0
