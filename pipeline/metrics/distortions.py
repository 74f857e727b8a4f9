"""Distortions of one strength scale, to train and to test quality metrics.

Strength 0 is barely visible and 1 is ruinous, in each kind; the picture itself is milder than strength 0.
These are no model of a camera (that is ``iqpir.degradation``): each kind is pure, so that a metric's
answer to it can be told apart.
"""

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from iqpir.errors import UsageError

Picture = NDArray[np.uint8]

BASIC = ("blur", "noise", "jpeg", "downsample")
"""The kinds that every general metric should order."""


def distort(picture: Picture, kind: str, strength: float, seed: int) -> Picture:
    """``picture`` distorted.

    Args:
        picture: uint8 RGB [H,W,3].
        kind: a name in ``KINDS``.
        strength: in [0, 1].
        seed: of the noise and of the choices within a kind; the same for all strengths of a chain.

    Returns:
        uint8 RGB of the same size.

    Raises:
        UsageError: unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"Unknown distortion {kind!r}.", f"Choose among {', '.join(KINDS)}.")
    return KINDS[kind](picture, float(np.clip(strength, 0.0, 1.0)), np.random.default_rng(seed))


def _between(low: float, high: float, strength: float) -> float:
    """Geometric interpolation: equal steps of strength are about equal steps for the eye."""
    return float(low * (high / low) ** strength)


def _uint8(values: NDArray[np.float32]) -> Picture:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _blur(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    sigma = _between(0.5, 5.0, strength)
    ratio = rng.uniform(1.0, 1.5)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma * ratio, sigmaY=sigma / ratio), np.uint8)


def _noise(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    channels = 1 if rng.random() < 0.3 else 3
    grain = rng.standard_normal((*picture.shape[:2], channels), np.float32)
    return _uint8(picture + np.float32(_between(2.0, 50.0, strength)) * grain)


def _jpeg(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    quality = round(105.0 - _between(10.0, 100.0, strength))
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])


def _downsample(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    height, width = picture.shape[:2]
    factor = _between(1.25, 6.0, strength)
    up = int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4]))
    small = (max(2, round(width / factor)), max(2, round(height / factor)))
    shrunk = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(shrunk, (width, height), interpolation=up), np.uint8)


def _median(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Painted look of an over-smoothing restorer: edges stay, texture goes."""
    size = 3 + 2 * min(3, int(strength * 4))
    smooth = cv2.medianBlur(picture, size).astype(np.float32)
    share = np.float32(0.4 + 0.6 * strength)
    return _uint8(picture + share * (smooth - picture))


def _oversharpen(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    blurred = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.8, 2.0)).astype(np.float32)
    return _uint8(picture + np.float32(_between(0.5, 5.0, strength)) * (picture - blurred))


def _grid(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Periodic pattern, as up-sampling layers leave behind."""
    height, width = picture.shape[:2]
    period = int(rng.choice([2, 4, 8]))
    tile = rng.standard_normal((period, period, 3)).astype(np.float32)
    pattern = np.tile(tile, (height // period + 1, width // period + 1, 1))[:height, :width]
    return _uint8(picture + np.float32(_between(2.0, 30.0, strength)) * pattern)


def _mixture(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Blur, fewer pixels, noise and JPEG in a row, each with its own share of the strength."""
    for kind in (_blur, _downsample, _noise, _jpeg):
        share = rng.uniform(0.2, 1.0)
        picture = kind(picture, strength * share, rng)
    return picture


KINDS: Mapping[str, Callable[[Picture, float, np.random.Generator], Picture]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "downsample": _downsample,
    "median": _median,
    "oversharpen": _oversharpen,
    "grid": _grid,
    "mixture": _mixture,
}
