"""Judge pictures against their originals: calibrated quality by several metrics, PSNR and SSIM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from iqpir.quality_prior import Scorer
from pipeline.metrics import find_metrics
from pipeline.scoring.calibration import Calibration, ScoreMap
from pipeline.training.feed import Picture, pictures_to_tensor

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Figures of one set of pictures, a value each picture."""

    qualities: Values
    by_metric: Mapping[str, Values]
    """Calibrated, in [0,1]."""
    psnrs: Values
    """In dB, at most 100 (identical pictures)."""
    ssims: Values

    @property
    def quality(self) -> float:
        """Mean quality."""
        return float(self.qualities.mean())

    @property
    def scores(self) -> dict[str, float]:
        """Mean calibrated score of each metric."""
        return {name: float(values.mean()) for name, values in self.by_metric.items()}

    @property
    def psnr(self) -> float:
        """Mean PSNR."""
        return float(self.psnrs.mean())

    @property
    def ssim(self) -> float:
        """Mean SSIM."""
        return float(self.ssims.mean())

    def means(self, chosen: Sequence[bool]) -> dict[str, float]:
        """Mean quality, PSNR and SSIM of the ``chosen`` pictures, of which there is at least one."""
        part = np.asarray(chosen, bool)
        sets = {"quality": self.qualities, "psnr": self.psnrs, "ssim": self.ssims}
        return {name: float(values[part].mean()) for name, values in sets.items()}


class Judge:
    """Measures pictures: calibrated quality by the ensemble, PSNR and SSIM against HQ.

    Args:
        calibration: of the labels.
        metrics: of the ensemble.
        device: where they run.
        hq: the originals.
        further: metric -> map, of metrics that are measured and not part of the quality.
        weights_uri: mirror of the metrics' weight files; "": they are in the caches of libraries.
    """

    def __init__(
        self,
        calibration: Calibration,
        metrics: list[str],
        device: str,
        hq: list[Picture],
        further: Mapping[str, ScoreMap] | None = None,
        weights_uri: str = "",
    ) -> None:
        self.calibration, self.hq, self.further = calibration, hq, further or {}
        self.scorers = _scorers(metrics, device, weights_uri)
        self._others = _scorers(list(self.further), device, weights_uri)

    def measure(self, pictures: list[Picture]) -> Measured:
        """Figures of ``pictures``, uint8 RGB HWC, in the order of the HQ ones."""
        raw = {name: score_pictures(scorer, pictures) for name, scorer in self.scorers.items()}
        others = {name: self.further[name](score_pictures(found, pictures)) for name, found in self._others.items()}
        pairs = list(zip(self.hq, pictures, strict=True))
        return Measured(
            self.calibration.quality(raw),
            {**self.calibration.calibrate(raw), **others},
            np.array([_psnr(hq, picture) for hq, picture in pairs]),
            np.array([structural_similarity(hq, picture, channel_axis=2) for hq, picture in pairs]),
        )


def _scorers(names: list[str], device: str, weights_uri: str) -> dict[str, Scorer]:
    found = find_metrics(names) if names else []
    return {metric.name: metric.scorer(device, weights_uri or None) for metric in found}


def _psnr(hq: Picture, picture: Picture) -> float:
    """In dB, at most 100 (identical pictures)."""
    if np.array_equal(hq, picture):
        return 100.0
    return min(100.0, float(peak_signal_noise_ratio(hq, picture, data_range=255)))


def score_pictures(scorer: Scorer, pictures: list[Picture], batch_size: int = 32) -> Values:
    """Raw scores [N] of uint8 RGB HWC pictures of one size."""
    scores = []
    with torch.inference_mode():
        for start in range(0, len(pictures), batch_size):
            batch = pictures_to_tensor(pictures[start : start + batch_size]).add_(1).div_(2)
            scores.append(scorer(batch).double().cpu().numpy())
    return np.concatenate(scores)
