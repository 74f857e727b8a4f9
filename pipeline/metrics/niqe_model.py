"""Fit NIQE's model of pristine pictures (Mittal et al., IEEE SPL 2013) on pictures of free licence.

pyiqa computes NIQE but fetches the authors' model from the network. This one is fitted here, so that ``niqe``
needs no download; its values are not comparable with published ones. The features are those of pyiqa, computed
faster: a test holds scores with the same model to pyiqa's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from iqpir.errors import UsageError
from pipeline.metrics.distortions import Picture
from pipeline.torchvision_ops import ensure_torchvision_operators

BLOCK = 96
"""Side of a block in pixels, as in the paper."""
SHARPNESS_SHARE = 0.5
"""A block counts when its mean local deviation exceeds this share of the picture's largest (T; the paper
takes 0.75, which leaves 150 blocks of the 24 Kodak pictures, too few for 36 features; 0.5 leaves 395)."""
FEATURES = 36


@dataclass(frozen=True)
class PristineModel:
    """Multivariate Gaussian of block features: mean [36], covariance [36,36], and the blocks it rests on."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    blocks: int


def fit_pristine_model(pictures: Sequence[Picture]) -> PristineModel:
    """Fit the Gaussian on the sharp blocks of ``pictures`` (uint8 RGB, sides of at least 192).

    Raises:
        UsageError: fewer than 200 sharp blocks: the covariance of 36 features would be worthless.
    """
    features = np.concatenate([_sharp_block_features(picture) for picture in pictures])
    features = features[np.isfinite(features).all(axis=1)]
    if len(features) < 200:
        raise UsageError(f"Only {len(features)} sharp blocks for NIQE; it needs 200.", "Give more pictures.")
    return PristineModel(features.mean(axis=0), np.cov(features, rowvar=False), len(features))


def save_pristine_model(model: PristineModel, path: Path, facts: dict[str, str]) -> None:
    """Write the ``.mat`` that pyiqa's ``pretrained_model_path`` reads, with ``facts`` beside the arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    arrays = {"mu_prisparam": model.mean[None], "cov_prisparam": model.covariance}
    with temporary.open("wb") as file:
        scipy.io.savemat(file, {**arrays, **facts, "blocks": model.blocks})
    _erase_date(temporary)
    temporary.replace(path)


def load_pristine_model(path: Path) -> PristineModel:
    """Inverse of ``save_pristine_model``; the authors' own file is read as well."""
    arrays = scipy.io.loadmat(str(path))
    blocks = int(arrays["blocks"].item()) if "blocks" in arrays else 0
    return PristineModel(np.ravel(arrays["mu_prisparam"]), arrays["cov_prisparam"], blocks)


class Niqe(nn.Module):
    """NIQE, lower is better: the distance of a picture's block features from the pristine Gaussian (eq. 10).

    The score is pyiqa's (to 1e-5, relatively) wherever pyiqa gives one. pyiqa stops at a picture whose
    blocks are flat or whose only block leaves no covariance. Here blocks without statistics are left out, a
    single block counts with no covariance of its own, and a picture without any contrast has features of
    zero: far from pristine, as it should be. So each picture has a finite score.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self, model: PristineModel) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(np.array(model.mean, np.float64)))
        self.register_buffer("covariance", torch.from_numpy(np.array(model.covariance, np.float64)))

    def forward(self, pictures: Tensor) -> Tensor:
        """[B,3,H,W] in [0,1], sides of at least 96 -> [B]."""
        return torch.stack([self._distance(features) for features in _block_features(_luma(pictures))])

    def _distance(self, features: Tensor) -> Tensor:
        """[blocks,36] of one picture -> its distance, 0-d."""
        valid = features[features.isfinite().all(dim=1)]
        if not len(valid):
            valid = torch.zeros_like(features[:1])
        spread = torch.cov(valid.T) if len(valid) > 1 else torch.zeros_like(self.covariance)
        difference = self.mean - _finite_means(features, valid)
        inverse = torch.linalg.pinv((self.covariance + spread) / 2)
        squared: Tensor = difference @ inverse @ difference
        return squared.clamp(min=0).sqrt()


def _finite_means(features: Tensor, valid: Tensor) -> Tensor:
    """Mean of each feature [36] over the blocks that have it, as the authors take it; else over ``valid``."""
    means = features.nanmean(dim=0)
    return torch.where(means.isfinite(), means, valid.mean(dim=0))


def _erase_date(path: Path) -> None:
    """Blank the creation date in the text header, so that the same fit gives the same file."""
    header = b"MATLAB 5.0 MAT-file, NIQE pristine model fitted by iqpir"
    with path.open("r+b") as file:
        file.write(header.ljust(116))


def _sharp_block_features(picture: Picture) -> NDArray[np.float64]:
    """Features [n,36] of the picture's sharp blocks, at full and at half resolution."""
    luma = _luma(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255.0)
    sharpness = _block_means(_window_statistics(luma)[1], BLOCK)
    features = _block_features(luma)[0]
    return np.asarray(features[sharpness > SHARPNESS_SHARE * sharpness.max()].numpy(), np.float64)


def _luma(pictures: Tensor) -> Tensor:
    """RGB [B,3,H,W] in [0,1] -> rounded luma [B,1,h,w] in 0..255, float64, cut to whole blocks."""
    ensure_torchvision_operators()
    from pyiqa.utils.color_util import to_y_channel

    luma: Tensor = to_y_channel(pictures, 255, "yiq").round().double()
    height, width = (side // BLOCK * BLOCK for side in luma.shape[-2:])
    return luma[..., :height, :width]


def _block_features(luma: Tensor) -> Tensor:
    """Luma [B,1,h,w], h and w multiples of 96 -> features [B,blocks,36] at full and at half resolution."""
    from pyiqa.archs.niqe_arch import imresize

    half = imresize(luma / 255.0, scale=0.5, antialiasing=True) * 255.0
    scales = ((luma, BLOCK), (half, BLOCK // 2))
    return torch.cat([_features(_blocks(_locally_normalised(image), side)) for image, side in scales], dim=-1)


def _blocks(luma: Tensor, side: int) -> Tensor:
    """[B,1,h,w] -> [B,blocks,side,side], column by column, rows within, as pyiqa's blockproc orders them."""
    count, _, height, width = luma.shape
    grid = luma.view(count, height // side, side, width // side, side)
    return grid.permute(0, 3, 1, 2, 4).reshape(count, -1, side, side)


def _features(blocks: Tensor) -> Tensor:
    """The 18 features of a scale (section II): normalised luma [B,n,side,side] -> [B,n,18]."""
    neighbours = [blocks.roll(shift, (2, 3)) for shift in ((0, 1), (1, 0), (1, 1), (1, -1))]
    alpha, left, right = _fit_aggd(torch.stack([blocks, *(blocks * other for other in neighbours)], dim=2))
    mean = (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
    own = torch.stack([alpha[..., 0], (left[..., 0] + right[..., 0]) / 2], dim=-1)
    products = torch.stack([alpha, mean, left, right], dim=-1)[:, :, 1:]
    return torch.cat([own, products.flatten(2)], dim=-1)


def _fit_aggd(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussians (eq. 4) by moments (Lasmar et al., ICIP 2009).

    Args:
        values: [...,h,w], a distribution each.

    Returns:
        shape alpha, 0.2 to 10 in steps of 0.001, and the scales of the left and of the right side, [...] each; not
        a number where a side has no value, and alpha 0.2 there, as pyiqa has it.
    """
    shapes, ratios = _aggd_table()
    squares = values**2
    left, right = (
        (squares * side).sum((-1, -2)).div(side.sum((-1, -2), dtype=torch.float32)).sqrt()
        for side in (values < 0, values > 0)
    )
    skew = left / right
    ratio = values.abs().mean((-1, -2)) ** 2 / squares.mean((-1, -2))
    wanted = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes, ratios = shapes.to(values), ratios.to(values)
    above = torch.searchsorted(ratios, wanted.contiguous()).clamp(1, len(ratios) - 1)
    nearest = torch.where(wanted - ratios[above - 1] <= ratios[above] - wanted, above - 1, above)
    alpha = shapes[nearest.where(wanted.isfinite(), 0)]
    spread = (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)).exp().sqrt()
    return alpha, left * spread, right * spread


@cache
def _aggd_table() -> tuple[Tensor, Tensor]:
    """Shapes, and the ratio of moments that each has (rising), [9801] each."""
    shapes = torch.arange(0.2, 10.001, 0.001).double()
    ratios = (2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)).exp()
    return shapes, ratios


def _locally_normalised(luma: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luma (eq. 1): [B,1,h,w] -> the same."""
    mean, deviation = _window_statistics(luma)
    return (luma - mean) / (deviation + 1)


def _window_statistics(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation in the window of each pixel (eq. 2, 3): [B,1,H,W] -> twice the same."""
    mean = _window_means(luma)
    return mean, (_window_means(luma**2) - mean**2).abs().sqrt()


def _window_means(luma: Tensor) -> Tensor:
    """Mean in pyiqa's 7x7 Gaussian window (sigma 7/6) at each pixel, borders repeated: [B,1,H,W] -> the same.

    As two one-dimensional passes, 20 times faster than pyiqa's single one of 49 taps. The taps add up to what
    pyiqa's do, 1 + 1e-8 from single precision: that decides the deviation of flat regions, and with it their score.
    """
    from pyiqa.matlab_utils import fspecial

    window = fspecial(7, 7.0 / 6, 1).to(luma)
    taps = window.sum(dim=2, keepdim=True) / window.sum().sqrt()
    padded = functional.pad(luma, (3, 3, 3, 3), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, taps), taps.transpose(2, 3))


def _block_means(values: Tensor, side: int) -> Tensor:
    """Mean of each block, in the order of pyiqa's blockproc: column by column, rows within."""
    means = functional.avg_pool2d(values, side)[0, 0]
    return means.T.reshape(-1)
