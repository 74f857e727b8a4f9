"""Judged pictures: means over all and over some, and restoration without codebooks."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from iqpir.errors import UsageError
from iqpir.networks.fidelity import keep_tones
from iqpir.quality_prior import QualityPrior
from iqpir.restorer import Restorer
from pipeline.judging.continuous import restored_without_codes
from pipeline.judging.judge import Judge, Measured, score_pictures
from pipeline.scoring.calibration import Calibration, ScoreMap
from pipeline.training.prior import PriorConfig, prior_by
from tests.conftest import draw_picture
from tests.pipeline.tiny_checkpoint import write_checkpoint


def test_means_are_over_the_chosen_pictures() -> None:
    values = np.array([0.2, 0.4, 0.9])
    found = Measured(values, {"rank": values}, values * 10, values)
    assert found.quality == pytest.approx(0.5) and found.psnr == pytest.approx(5.0)
    assert found.scores == pytest.approx({"rank": 0.5})
    assert found.means([True, False, True]) == pytest.approx({"quality": 0.55, "psnr": 5.5, "ssim": 0.55})


def test_scores_are_of_each_picture_whatever_the_batch() -> None:
    pictures = [draw_picture(seed, 32) for seed in range(5)]

    def mean(batch: torch.Tensor) -> torch.Tensor:
        return batch.mean(dim=(1, 2, 3))

    found = score_pictures(mean, pictures, batch_size=2)
    np.testing.assert_allclose(found, [picture.mean() / 255 for picture in pictures], rtol=1e-5)


def test_without_codes_the_conditioned_latent_is_decoded(tmp_path: Path) -> None:
    restorer = Restorer.load(write_checkpoint(tmp_path))
    continuous = restored_without_codes(restorer)
    lq, quality = torch.rand(1, 3, 32, 32) * 2 - 1, torch.tensor([0.9])
    with torch.no_grad():
        latent = restorer.network.predict(lq, quality).latent
        expected = keep_tones(restorer.network.decode(latent), lq, restorer.network.config.tones)
        torch.testing.assert_close(continuous.network(lq, quality), expected)
        assert not torch.allclose(restorer.network(lq, quality), expected)


CNNIQA = Calibration(
    name="c",
    metrics={"cnniqa": ScoreMap(kind="range", direction="higher", knots=(0.0, 1.0), values=(0.0, 1.0))},
    fingerprints={},
    consensus=None,
    reference={},
)


def judge(weights_uri: str) -> Judge:
    return Judge(CNNIQA, ["cnniqa"], "cpu", [], None, weights_uri)


def judge_from_outside(weights_uri: str) -> Judge:
    return Judge(CNNIQA, [], "cpu", [], CNNIQA.metrics, weights_uri)


def prior(weights_uri: str) -> QualityPrior:
    return prior_by(CNNIQA, "v", PriorConfig(metrics=["cnniqa"], weights_uri=weights_uri), torch.device("cpu"))


@pytest.mark.parametrize("build", [judge, judge_from_outside, prior])
def test_weights_that_are_not_on_the_disk_come_from_the_mirror(
    build: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named where they are looked for: in the mirror if there is one, else in the cache."""
    if find_spec("pyiqa") is None:
        pytest.skip("pyiqa is not installed: its metrics come with the extra iqa")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(
        UsageError, match=rf"'cnniqa' needs {tmp_path}/mirror/\S+\.pth and {tmp_path}/mirror/SHA256SUMS"
    ):
        build(str(tmp_path / "mirror"))
    with pytest.raises(UsageError, match="weights are not downloaded"):
        build("")
