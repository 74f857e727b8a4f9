"""A condition of several scores, from the columns of the labels to a dial for each."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iqpir.config import NetworkConfig, preset
from iqpir.errors import UsageError
from iqpir.restorer import Restorer
from iqpir.training import checkpoint
from pipeline.commits.units import SchedulingConfig
from pipeline.encode import EncodeConfig, encode
from pipeline.restore import RestoreConfig, restore
from pipeline.score import ScoreConfig, score
from pipeline.stage1 import train_stage1
from pipeline.stage2 import train_stage2
from pipeline.stage3 import Stage3Training, train_stage3
from pipeline.training.config import Training
from pipeline.training.feed import FeedConfig, Samples, collate
from pipeline.training.scores import check_scores, condition
from tests.chain import HERE, Chain, label_and_curate
from tests.pipeline.conftest import LabelledCorpus, MakeCorpus


@pytest.fixture(scope="module")
def made(labelled_corpus: MakeCorpus) -> LabelledCorpus:
    return labelled_corpus(held_back=4)


def network(**changes: Any) -> NetworkConfig:
    return dataclasses.replace(preset("tiny32"), **{"quality_bins": (10, 10), **changes})


def test_a_batch_has_the_scores_of_its_samples_in_the_order_that_was_asked_for(made: LabelledCorpus) -> None:
    rows = made.view.split("train")
    samples = Samples(made.url, rows, FeedConfig(), network(), None, None, 5, scores=["clean", "sharp"])
    batch = collate([samples[position] for position in range(6)])
    assert batch.quality.shape == (6, 2)
    for index, found in zip(batch.index.tolist(), batch.quality.tolist(), strict=True):
        assert found == [rows["iqa_clean_cal"][index].as_py(), rows["iqa_sharp_cal"][index].as_py()]
    plain = Samples(made.url, rows, FeedConfig(), network(), None, None, 5)
    one = collate([plain[position] for position in range(6)])
    assert one.quality.shape == (6,) and one.quality.dtype == batch.quality.dtype
    assert one.quality.tolist() == [rows["quality"][index].as_py() for index in one.index.tolist()]
    np.testing.assert_array_equal(condition(rows, []), rows["quality"].to_numpy())


@pytest.mark.parametrize(
    ("scores", "changes", "message"),
    [
        ([], {}, r"quality_bins has 2 entries for 1 score\(s\)"),
        (["sharp"], {}, r"quality_bins has 2 entries for 1 score\(s\)"),
        (["sharp", "musiq"], {}, "Choose among sharp, clean"),
        (["sharp", "sharp"], {}, "each must be another metric"),
        (["sharp", "clean"], {"hq_gate": "paper"}, "use hq_gate code"),
        (["sharp", "clean"], {"conditioning": "none"}, "need a condition"),
    ],
)
def test_scores_that_cannot_be_asked_for_are_refused(
    made: LabelledCorpus, scores: list[str], changes: dict[str, Any], message: str
) -> None:
    view = dataclasses.replace(made.view, facts={**made.view.facts, "metrics": ["sharp", "clean"]})
    check_scores(["sharp", "clean"], network(), view)
    check_scores([], preset("tiny32"), view)
    with pytest.raises(UsageError, match=message):
        check_scores(scores, network(**changes), view)


def test_what_a_metric_of_the_loss_should_match_has_to_be_asked(chain: Chain) -> None:
    with pytest.raises(UsageError, match="rank of the prior is none of the scores"):
        chain.data.stage2("x", "y", scores=["piqe", "niqe"])


def test_each_of_several_qualities_is_a_quality() -> None:
    with pytest.raises(UsageError, match=r"quality 1\.5 is outside"):
        RestoreConfig(model="run", input="a", output="b", quality=[0.1, 1.5])


@pytest.mark.slow
def test_each_score_has_a_dial_of_its_own(chain: Chain, tmp_path: Path) -> None:
    corpus = chain.data.corpus
    score(ScoreConfig(corpus=corpus, metrics=["rank_judge"], scheduling=HERE))
    data = label_and_curate(
        corpus, str(tmp_path / "runs"), chain.data.tracking_uri, "two", metrics=["rank", "rank_judge"]
    )
    stage1 = train_stage1(data.stage1("stage1", steps=2, checkpoint_every=2))
    settings = data.stage2("stage2", stage1.run, codes="online", steps=4, scores=["rank", "rank_judge"])
    stage2 = train_stage2(settings)
    found = checkpoint.load(Path(stage2.checkpoint))
    assert found.network_config.quality_bins == (10, 10) and found.metadata["lineage"]["scores"] == "rank rank_judge"
    maps = [found.model[f"score_embed.{number}.weight"] for number in (0, 1)]
    trained = [sorted(m.abs().sum(1).nonzero().flatten().tolist()) for m in maps]
    assert trained[0] and trained[1] and trained[0] != trained[1], "each by its own score"

    restorer, picture = Restorer.load(stage2.checkpoint), np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(UsageError, match=r"one or 2: of rank, rank_judge"):
        restorer.restore(picture, quality=[0.1, 0.2, 0.3])
    pictures = chain.folder / "pictures"
    asked = {"input": str(pictures), "model": stage2.run, "scheduling": SchedulingConfig(workers=0)}
    for name, quality in (("a", [0.05, 0.95]), ("b", [0.95, 0.05]), ("c", 0.95)):
        restore(RestoreConfig(**asked, output=str(tmp_path / name), quality=quality))  # type: ignore[arg-type]
    assert len({(tmp_path / name / "00.png").read_bytes() for name in "abc"}) == 3

    common = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Training)}
    encode(EncodeConfig(corpus=corpus, stage1=stage1.run, scheduling=HERE))
    third = Stage3Training(**{**common, "name": "stage3", "steps": 1}, stage2=stage2.run, perceptual="ssim")
    assert train_stage3(third).lineage["scores"] == "rank rank_judge"
    with pytest.raises(UsageError, match="quality_bins has 2 entries"):
        train_stage2(data.stage2("no", stage1.run, codes="online", network={"quality_bins": [10, 10]}))
