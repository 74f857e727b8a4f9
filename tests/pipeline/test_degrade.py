"""A degradation can be made again: the one of a training by key and epoch, and a view's fixed pairs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from iqpir.config import preset
from iqpir.degradation.parameters import PRESETS, DegradationParameters, parameters_for_key, scaled
from iqpir.degradation.picture import degrade as degrade_as_fed
from iqpir.degradation.reference import degrade as degrade_picture
from iqpir.errors import UsageError
from iqpir.stages.stage3 import Stage3Config
from pipeline.degrade import DegradeConfig, degrade, parameters_of
from pipeline.stage3 import PhasedDegradation
from pipeline.training.feed import FeedConfig, Samples

TINY = {"preset": "tiny32", "degradation": "tiny32"}


@pytest.fixture(scope="module")
def made(labelled_corpus: Any) -> Any:
    return labelled_corpus(sides=(32,) * 5 + (40, 64, 48), held_back=3)


def pixels(path: str | Path) -> Any:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    ("fit", "flip", "name"),
    [("crop", True, "tiny32"), ("resize", False, "tiny32"), ("crop", True, "backlit"), ("resize", False, "low_light")],
)
def test_a_replay_is_what_the_feed_gave(made: Any, tmp_path: Path, fit: str, flip: bool, name: str) -> None:
    rows = made.view.split("train")
    samples = Samples(
        made.url,
        rows,
        FeedConfig(fit=fit, flip=flip),  # type: ignore[arg-type]
        preset("tiny32"),
        scaled(PRESETS[name], 32),
        None,
        11,
    )
    seen = {}
    for position in range(3 * len(samples)):
        item = samples[position]
        seen[position // len(samples), item.index] = item
    flipped = set()
    for (epoch, index), item in seen.items():
        config = DegradeConfig(
            corpus=made.url,
            output=str(tmp_path),
            view="small",
            key=rows["key"][index].as_py(),
            epoch=epoch,
            seed=11,
            fit=fit,  # type: ignore[arg-type]
            flip=flip,
            preset="tiny32",
            degradation=name,
        )
        hq, lq, record = degrade(config).files
        assert np.array_equal(pixels(hq), item.hq)
        assert item.lq is not None
        assert np.array_equal(pixels(lq), item.lq)
        facts = json.loads(Path(record).read_text())
        flipped.add(facts["flipped"])
        parameters = DegradationParameters.from_dict(facts["parameters"])
        assert np.array_equal(degrade_as_fed(item.hq, parameters), item.lq)
    assert flipped == ({True, False} if flip else {False})


def test_a_run_says_how_it_degraded(made: Any, tmp_path: Path) -> None:
    run = {
        "stage": "stage2",
        "training": {"seed": 77, "degradation": "tiny32"},
        "fit": "resize",
        "flip": True,
        "network": preset("tiny32").to_dict(),
        "lineage": {"view_name": made.view.reference},
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    key = made.view.split("train")["key"][2].as_py()
    common = {"corpus": made.url, "key": key, "epoch": 4}
    by_run = degrade(DegradeConfig(run=str(tmp_path / "run"), output=str(tmp_path / "a"), **common))
    by_hand = degrade(
        DegradeConfig(
            view="small",
            seed=77,
            fit="resize",
            output=str(tmp_path / "b"),
            **common,
            **TINY,  # type: ignore[arg-type]
        )
    )
    assert by_run.digest == by_hand.digest
    assert np.array_equal(pixels(by_run.files[1]), pixels(by_hand.files[1]))


@pytest.mark.parametrize("shards_per_block", [0, 1])
def test_a_replay_of_stage_3_has_the_degradation_of_its_step(made: Any, tmp_path: Path, shards_per_block: int) -> None:
    stage = Stage3Config(first_steps=2, second_steps=1, code_steps=2, fidelity_every=3)
    run = {
        "stage": "stage3",
        "training": {
            "seed": 5,
            "batch_size": 2,
            "degradation": "tiny32",
            "light_degradation": "fidelity",
            "stage": dataclasses.asdict(stage),
        },
        "fit": "resize",
        "flip": True,
        "network": preset("tiny32").to_dict(),
        "lineage": {"view_name": made.view.reference},
        "shards_per_block": shards_per_block,
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    rows = made.view.split("train")
    strong, light = scaled(PRESETS["tiny32"], 32), scaled(PRESETS["fidelity"], 32)
    schedule = PhasedDegradation(strong, light, stage, 2)
    feed = FeedConfig(fit="resize", shards_per_block=shards_per_block)
    samples = Samples(made.url, rows, feed, preset("tiny32"), strong, None, 5, schedule)
    kinds = set()
    for position in range(4 * len(samples)):
        item = samples[position]
        key, epoch = rows["key"][item.index].as_py(), position // len(samples)
        config = DegradeConfig(corpus=made.url, run=str(tmp_path), key=key, epoch=epoch, output=str(tmp_path / "out"))
        _, lq, record = degrade(config).files
        assert item.lq is not None
        assert np.array_equal(pixels(lq), item.lq)
        kinds.add(json.loads(Path(record).read_text())["degradation"] == light.to_dict())
    assert kinds == {True, False}


@pytest.mark.parametrize("name", ["tiny32", "underwater", "colourisation"])
def test_pairs_are_fixed_and_their_parameters_make_them_again(made: Any, tmp_path: Path, name: str) -> None:
    def pairs(output: str, seed: int = 3) -> Any:
        return degrade(
            DegradeConfig(
                corpus=made.url,
                view="small",
                output=str(tmp_path / output),
                seed=seed,
                fit="resize",
                preset="tiny32",
                degradation=name,
            )
        )

    config = scaled(PRESETS[name], 32)
    first, second, other = pairs("one"), pairs("two"), pairs("three", seed=4)
    assert first.digest == second.digest != other.digest
    table = pq.read_table(tmp_path / "one" / "parameters.parquet").to_pylist()
    keys = made.view.split("val")["key"].to_pylist()
    assert [row["key"] for row in table] == keys
    for row in table:
        parameters = parameters_of(row)
        assert parameters == parameters_for_key(config, 3, row["key"])
        hq, lq = (pixels(tmp_path / "one" / kind / f"{row['key']}.png") for kind in ("hq", "lq"))
        assert hq.shape == (32, 32, 3)
        assert np.array_equal(degrade_picture(hq, parameters), lq)
        assert np.array_equal(lq, pixels(tmp_path / "two" / "lq" / f"{row['key']}.png"))
        assert not np.array_equal(lq, pixels(tmp_path / "three" / "lq" / f"{row['key']}.png"))


def test_unknown_keys_and_contradictions_say_what_to_do(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no sample"):
        degrade(
            DegradeConfig(corpus=made.url, view="small", key="0" * 32, output=str(tmp_path), **TINY)  # type: ignore[arg-type]
        )
    with pytest.raises(UsageError, match="Neither view nor run"):
        DegradeConfig(corpus="c", output="o")
    with pytest.raises(UsageError, match="needs --key"):
        DegradeConfig(corpus="c", output="o", run="r")
    with pytest.raises(UsageError, match=r"no run\.json"):
        degrade(DegradeConfig(corpus=made.url, run=str(tmp_path), key="k", output=str(tmp_path)))
