"""The colour jitter of colourisation training: its draw. ``reference`` and ``batched`` apply it."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Step = Literal["brightness", "contrast", "saturation", "hue"]
STEPS: tuple[Step, ...] = ("brightness", "contrast", "saturation", "hue")
JITTER_DRAWS = 9
"""A coin, four factors, four numbers whose ranks are the order."""

_RANGES = {"brightness": (0.5, 1.5), "contrast": (0.5, 1.5), "saturation": (0.0, 1.5), "hue": (-0.1, 0.1)}
GRAY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Four changes of colour, one after the other; published ranges (GFPGAN, CodeFormer).

    ``brightness`` f: ``f x``. ``contrast`` f: ``f x + (1 - f) mean(gray(x))``. ``saturation`` f:
    ``f x + (1 - f) gray(x)``. ``hue`` f: the HSV hue turned by f of a full turn. Each is clipped to [0, 1].
    """

    order: tuple[Step, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float


def draw_jitter(draws: NDArray[np.float64]) -> Jitter:
    """A jitter from the last eight of ``JITTER_DRAWS`` uniform numbers."""
    factors = {step: float(low + (high - low) * draws[1 + n]) for n, (step, (low, high)) in enumerate(_RANGES.items())}
    return Jitter(order=tuple(STEPS[rank] for rank in np.argsort(draws[5:9])), **factors)


def jitter_from(values: dict[str, Any]) -> Jitter:
    """Inverse of ``dataclasses.asdict``."""
    return Jitter(**{**values, "order": tuple(values["order"])})
