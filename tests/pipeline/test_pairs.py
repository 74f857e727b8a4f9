"""Degraded pictures that exist are paired with good ones, checked before the start, and fed, trained and evaluated."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from iqpir.config import preset
from iqpir.degradation.parameters import PRESETS
from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import PixelPolicy
from pipeline.corpus import Corpus
from pipeline.degrade import DegradeConfig, degrade
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.shard import ShardConfig, shard
from pipeline.sharding.crops import CropPolicy
from pipeline.stage2 import train_stage2
from pipeline.stage3 import Stage3Training, train_stage3
from pipeline.training.config import Training
from pipeline.training.feed import FeedConfig, IndexedFeed, Samples
from pipeline.training.pairs import Pairs, PairsConfig, find_pairs
from tests.chain import Chain

SIDES = (32,) * 5 + (40, 64, 48)


@pytest.fixture(scope="module")
def made(labelled_corpus: Any) -> Any:
    return labelled_corpus(sides=SIDES, held_back=3)


def originals(made: Any) -> Path:
    return Path(made.url).parent / "pictures"


def inverted(picture: Image.Image) -> Image.Image:
    """A degradation that can be told from every other, and undone."""
    return Image.fromarray(255 - np.asarray(picture.convert("RGB")))


def degraded_corpus(source: Path, folder: Path, scale: int = 1, leave_out: str = "", **settings: Any) -> str:
    """A corpus of the pictures of ``source`` inverted, as TIFF files, ``scale`` times smaller."""
    (folder / "lq").mkdir(parents=True)
    for path in sorted(source.glob("[0-9]*.png")):
        if path.stem == leave_out:
            continue
        picture = inverted(Image.open(path))
        picture.resize((picture.width // scale, picture.height // scale), Image.Resampling.BOX).save(
            folder / "lq" / f"{path.stem}.tif"
        )
    url = str(folder / "lq-corpus")
    shard(ShardConfig(input=str(folder / "lq"), corpus=url, min_side=8, workers=0, collection="degraded", **settings))
    return url


def pairs_of(made: Any, config: PairsConfig, split: str = "train") -> Pairs:
    return find_pairs(config, made.corpus, made.view.split(split)["key"].to_pylist(), PixelPolicy())


def fed(made: Any, pairs: Pairs, fit: str = "crop") -> Samples:
    feed = FeedConfig(fit=fit)  # type: ignore[arg-type]
    rows = made.view.split("train")
    return Samples(made.url, rows, feed, preset("tiny32"), PRESETS["tiny32"], None, 5, None, pairs)


@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_both_pictures_of_a_pair_are_cut_and_mirrored_alike(made: Any, tmp_path: Path, fit: str) -> None:
    config = PairsConfig(lq=degraded_corpus(originals(made), tmp_path))
    samples = fed(made, pairs_of(made, config), fit)
    flipped = set()
    for position in range(4 * len(samples)):
        item = samples[position]
        assert item.lq is not None
        assert np.abs(item.hq.astype(int) - (255 - item.lq.astype(int))).max() <= (0 if fit == "crop" else 1)
        flipped.add(item.flipped)
    assert flipped == {True, False}


def test_a_feed_of_pairs_goes_on_exactly_from_any_sample(made: Any, tmp_path: Path) -> None:
    config = PairsConfig(lq=degraded_corpus(originals(made), tmp_path))
    samples = pickle.loads(pickle.dumps(fed(made, pairs_of(made, config))))

    def batches(start: int, rank: int, world: int) -> list[torch.Tensor]:
        feed = IndexedFeed(samples, 4, rank, world, torch.device("cpu")).batches(start)
        return [batch.degraded for batch, _ in zip(feed, range((24 - start) // 4), strict=False)]

    whole = batches(0, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(batches(12, 0, 1), whole[3:], strict=True))
    halves = zip(batches(12, 0, 2), batches(12, 1, 2), strict=True)
    assert all(torch.equal(torch.cat(two), one) for two, one in zip(halves, whole[3:], strict=True))


def test_crops_of_good_pictures_meet_the_same_place_of_smaller_degraded_ones(tmp_path: Path) -> None:
    """Smooth pictures, so that enlarging gives back what shrinking took."""
    (tmp_path / "hq").mkdir()
    for number in range(2):
        ramp = np.linspace(0, 200, 64, dtype=np.float32)
        picture = np.stack([ramp[None].repeat(64, 0), ramp[:, None].repeat(64, 1), np.full((64, 64), 60.0 * number)], 2)
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "hq" / f"{number}.png")
    url = str(tmp_path / "corpus")
    shard(ShardConfig(input=str(tmp_path / "hq"), corpus=url, crop=CropPolicy(size=24, stride=20), workers=0))
    corpus = Corpus(url)
    rows = corpus.samples().to_pylist()
    config = PairsConfig(lq=degraded_corpus(tmp_path / "hq", tmp_path, scale=2), scale=2)
    pairs = find_pairs(config, corpus, [row["key"] for row in rows], PixelPolicy())
    assert len(pairs) == len(rows) == 18
    for number, row in enumerate(rows):
        x, y = row["crop_x"], row["crop_y"]
        good = np.asarray(Image.open(tmp_path / "hq" / row["relpath"]))[y : y + 24, x : x + 24]
        lq: NDArray[np.uint8] = pairs.lq(number)
        assert lq.shape == good.shape
        # Three levels a pixel: a shift by one would show.
        assert np.abs(255 - lq.astype(int) - good)[2:-2, 2:-2].max() <= 2


def test_what_does_not_pair_is_said_before_anything_starts(made: Any, tmp_path: Path) -> None:
    source = originals(made)
    lacking = degraded_corpus(source, tmp_path / "a", leave_out="03")
    with pytest.raises(UsageError, match=r"1 good pictures have no degraded one in .*such as 03\.png"):
        for split in ("train", "val"):
            pairs_of(made, PairsConfig(lq=lacking), split)
    half = degraded_corpus(source, tmp_path / "b", scale=2)
    with pytest.raises(UsageError, match=r"not the pairs\.scale 1\. Set --pairs\.scale 2"):
        pairs_of(made, PairsConfig(lq=half))
    with pytest.raises(UsageError, match=r"not the pairs\.scale 3\. Set --pairs\.scale 2"):
        pairs_of(made, PairsConfig(lq=half, scale=3))
    cut = degraded_corpus(source, tmp_path / "c", crop=CropPolicy(size=16))
    with pytest.raises(UsageError, match="holds crops"):
        pairs_of(made, PairsConfig(lq=cut))
    (tmp_path / "d" / "lq").mkdir(parents=True)
    for suffix in ("png", "tif"):
        Image.open(source / "00.png").save(tmp_path / "d" / "lq" / f"00.{suffix}")
    shard(ShardConfig(input=str(tmp_path / "d" / "lq"), corpus=str(tmp_path / "d" / "c"), min_side=8, workers=0))
    with pytest.raises(UsageError, match="several pictures 00"):
        pairs_of(made, PairsConfig(lq=str(tmp_path / "d" / "c")))
    with pytest.raises(UsageError, match=r"pairs\.scale 0"):
        PairsConfig(lq="x", scale=0)
    with pytest.raises(UsageError, match=r"pairs\.lq is empty"):
        PairsConfig(scale=2)


def test_other_degraded_pictures_have_another_digest(made: Any, tmp_path: Path) -> None:
    first = pairs_of(made, PairsConfig(lq=degraded_corpus(originals(made), tmp_path / "a")))
    again = pairs_of(made, PairsConfig(lq=degraded_corpus(originals(made), tmp_path / "b", unit_samples=2)))
    assert first.digest == again.digest
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in originals(made).glob("[0-9]*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(changed / path.name)
    other = pairs_of(made, PairsConfig(lq=degraded_corpus(changed, tmp_path / "c")))
    assert other.digest != first.digest


@pytest.mark.slow
def test_stages_2_and_3_train_on_pairs_and_are_evaluated_on_them(chain: Chain, tmp_path: Path) -> None:
    lq = degraded_corpus(chain.folder / "pictures", tmp_path, scale=2)
    pairs = PairsConfig(lq=lq, scale=2)
    settings = chain.data.stage2("paired", chain.stage1.run, pairs=pairs)
    result = train_stage2(settings)
    assert result.status == "done" and len(result.lineage["pairs"]) == 32 and "degradation" not in result.lineage
    synthetic = train_stage2(chain.data.stage2("synthetic", chain.stage1.run))
    assert digest_of(result) != digest_of(synthetic)
    assert train_stage2(settings).status == "done earlier"
    with pytest.raises(UsageError, match="another lineage"):
        train_stage2(dataclasses.replace(settings, pairs=PairsConfig()))

    common = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Training)}
    changes = {"name": "paired3", "steps": 2, "stage2": result.run, "perceptual": "ssim", "pairs": pairs}
    third = Stage3Training(**{**common, **changes})
    assert train_stage3(third).lineage["pairs"] == result.lineage["pairs"]

    evaluation = EvaluateConfig(
        corpus=chain.data.corpus,
        view=chain.data.view,
        checkpoint=result.run,
        output=str(tmp_path / "evaluation"),
        dial=(0.05, 0.5, 0.95),
        samples=3,
        track=False,
    )
    with pytest.raises(UsageError, match=r"names no degradation.*--pairs\.lq"):
        evaluate(evaluation)
    measured = evaluate(dataclasses.replace(evaluation, pairs=pairs))
    # Inverted pictures are far from the good ones.
    assert measured.samples == 3 and measured.psnr["lq"] < 12
    key = next(iter((tmp_path / "evaluation" / "lq").iterdir())).stem
    with pytest.raises(UsageError, match="was trained on pairs"):
        degrade(DegradeConfig(corpus=chain.data.corpus, run=result.run, key=key, output=str(tmp_path)))


@pytest.mark.slow
def test_pairs_that_change_during_a_run_stop_it(chain: Chain, tmp_path: Path) -> None:
    pairs = PairsConfig(lq=degraded_corpus(chain.folder / "pictures", tmp_path / "a", scale=2), scale=2)
    settings = chain.data.stage2("changing", chain.stage1.run, pairs=pairs, steps=2)
    assert train_stage2(settings).status == "done"
    flipped = tmp_path / "flipped"
    flipped.mkdir()
    for path in (chain.folder / "pictures").iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(flipped / path.name)
    other = PairsConfig(lq=degraded_corpus(flipped, tmp_path / "b", scale=2), scale=2)
    with pytest.raises(UsageError, match=r"another lineage\.pairs"):
        train_stage2(dataclasses.replace(settings, pairs=other))


def digest_of(result: Any) -> str:
    config = json.loads((Path(result.checkpoint) / "config.json").read_text())
    return str(config["metadata"]["weights_digest"])


def test_a_row_that_says_another_size_is_a_lie(made: Any, tmp_path: Path) -> None:
    pairs = pairs_of(made, PairsConfig(lq=degraded_corpus(originals(made), tmp_path)))
    pairs.rows[0]["width"] += 1
    with pytest.raises(VerificationError, match="its row says 33x32"):
        pairs.lq(0)
