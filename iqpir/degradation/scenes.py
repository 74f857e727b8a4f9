"""What light does before the camera: darkness, water, or light from behind; its ranges, and one drawn scene.

The formulas are on ``LowLight``, ``Underwater`` and ``Backlit``; ``fields`` has the maps over the picture that
they need, and ``reference`` and ``batched`` apply them. Pictures have no depth map and no mask of the subject:
a tilted plane and a soft ellipse stand in for them, which is ours.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from iqpir.errors import UsageError

Range = tuple[float, float]

JERLOV: dict[str, tuple[float, float, float]] = {
    "I": (0.235, 0.043, 0.018),
    "IA": (0.240, 0.048, 0.025),
    "IB": (0.245, 0.054, 0.033),
    "II": (0.260, 0.076, 0.062),
    "III": (0.295, 0.116, 0.116),
    "1C": (0.300, 0.130, 0.170),
    "3C": (0.330, 0.200, 0.290),
    "5C": (0.400, 0.310, 0.430),
    "7C": (0.480, 0.490, 0.710),
    "9C": (0.600, 0.780, 1.230),
}
"""Attenuation per metre of red, green and blue light (600, 525, 475 nm) in each water type.

Source: N. G. Jerlov, Marine Optics, 2nd edition, 1976, table XXVII.
"""

SCENE_DRAWS = 12


@dataclass(frozen=True, kw_only=True)
class LowLightConfig:
    """Ranges of ``LowLight``."""

    exposure: Range = (0.9, 1.0)
    """Factor before the curve."""
    gain: Range = (0.5, 1.0)
    """Factor after the curve."""
    gamma: Range = (1.5, 4.0)
    """Exponent of the curve, above 1 darkens."""

    def __post_init__(self) -> None:
        _check_ranges(self, {"exposure": (1e-3, 1.0), "gain": (1e-3, 1.0), "gamma": (1.0, 10.0)})


@dataclass(frozen=True, kw_only=True)
class UnderwaterConfig:
    """Ranges of ``Underwater``."""

    waters: tuple[str, ...] = ("I", "IA", "IB", "II", "III", "1C", "3C", "5C")
    """Jerlov's water types, each as likely."""
    depth: Range = (0.5, 6.0)
    """Metres of water above, which colour the light."""
    distance: Range = (0.5, 5.0)
    """Metres to the middle of the picture."""
    tilt: Range = (0.0, 0.6)
    """How much nearer and farther the borders are, as a share of the distance."""
    veil: Range = (0.5, 0.95)
    """Brightness of water without end, at the surface, in linear light."""
    scatter: Range = (0.7, 1.3)
    """Attenuation of the backscattered light, relative to that of the direct light."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.waters) - JERLOV.keys())
        if unknown or not self.waters:
            raise UsageError(f"waters {unknown or 'is empty'} is unknown.", f"Choose among {', '.join(JERLOV)}.")
        _check_ranges(
            self,
            {"depth": (0.0, 100.0), "distance": (0.0, 100.0), "tilt": (0.0, 1.0), "veil": (0.0, 1.0)}
            | {"scatter": (0.0, 10.0)},
        )


@dataclass(frozen=True, kw_only=True)
class BacklitConfig:
    """Ranges of ``Backlit``."""

    shade: Range = (-4.0, -1.5)
    """Exposure of the subject in stops, 0 or below."""
    glare: Range = (0.0, 1.2)
    """Exposure of what is behind it in stops, 0 or above."""
    centre: Range = (0.3, 0.7)
    """Where the middle of the subject lies, as a share of width and of height."""
    radius: Range = (0.2, 0.5)
    """Half axes of the subject, as a share of width and of height."""
    softness: Range = (0.05, 0.3)
    """Width of its edge, as a share of its radius."""

    def __post_init__(self) -> None:
        _check_ranges(
            self,
            {"shade": (-20.0, 0.0), "glare": (0.0, 20.0), "centre": (0.0, 1.0), "radius": (1e-3, 10.0)}
            | {"softness": (1e-3, 10.0)},
        )


@dataclass(frozen=True, kw_only=True)
class LowLight:
    """``y = gain * (exposure * x)^gamma`` on display values.

    Source: Lv et al., Attention guided low-light image enhancement, arXiv 1908.00682, section on synthesis. Its
    noise is the chain's: its variance grows with the light (``shot``) above a floor (``noise``), as Foi et al.
    measured, IEEE TIP 2008.
    """

    exposure: float
    gain: float
    gamma: float
    kind: Literal["low_light"] = "low_light"


@dataclass(frozen=True, kw_only=True)
class Underwater:
    """``y = x * exp(-a (D + z)) + v * exp(-a D) * (1 - exp(-s a z))`` in linear light, for each colour.

    ``a`` are Jerlov's attenuations of the water, D the depth, z the distance of a pixel, v the veil, s the
    backscatter's own attenuation relative to ``a``. Source: the simplified Jaffe-McGlamery formation with two
    coefficients (Akkaynak and Treibitz, CVPR 2018), and light that lost its colours on the way down (Chiang and
    Chen, IEEE TIP 2012).
    """

    water: str
    depth: float
    distance: float
    tilt: float
    angle: float
    """Direction in which the distance grows, in radians."""
    veil: float
    scatter: float
    kind: Literal["underwater"] = "underwater"


@dataclass(frozen=True, kw_only=True)
class Backlit:
    """``y = x * 2^(glare + m (shade - glare))`` in linear light, m the subject's mask from 0 to 1.

    The subject is under-exposed, what is behind it over-exposed and clipped, as in the pictures of BAID (Lv et
    al., BacklitNet, CVIU 2022). The mask is a logistic edge around an ellipse; formula and ranges are ours.
    """

    shade: float
    glare: float
    centre_x: float
    centre_y: float
    radius_x: float
    radius_y: float
    softness: float
    kind: Literal["backlit"] = "backlit"


SceneConfig = LowLightConfig | UnderwaterConfig | BacklitConfig
Scene = LowLight | Underwater | Backlit
_KINDS: dict[str, type[LowLight] | type[Underwater] | type[Backlit]] = {
    "low_light": LowLight,
    "underwater": Underwater,
    "backlit": Backlit,
}


def draw_scene(config: SceneConfig, draws: NDArray[np.float64]) -> Scene:
    """One scene from ``SCENE_DRAWS`` uniform numbers, used by position."""
    values = iter(draws)

    def between(limits: Range) -> float:
        low, high = limits
        return float(low + (high - low) * next(values))

    if isinstance(config, LowLightConfig):
        return LowLight(exposure=between(config.exposure), gain=between(config.gain), gamma=between(config.gamma))
    if isinstance(config, UnderwaterConfig):
        return Underwater(
            water=config.waters[min(int(len(config.waters) * next(values)), len(config.waters) - 1)],
            depth=between(config.depth),
            distance=between(config.distance),
            tilt=between(config.tilt),
            angle=between((-math.pi, math.pi)),
            veil=between(config.veil),
            scatter=between(config.scatter),
        )
    return Backlit(
        shade=between(config.shade),
        glare=between(config.glare),
        centre_x=between(config.centre),
        centre_y=between(config.centre),
        radius_x=between(config.radius),
        radius_y=between(config.radius),
        softness=between(config.softness),
    )


def scene_from(values: Mapping[str, Any]) -> Scene:
    """Inverse of ``dataclasses.asdict``.

    Raises:
        UsageError: an unknown kind, or keys of another version.
    """
    kind = _KINDS.get(str(values.get("kind")))
    if kind is None or values.keys() != {field.name for field in dataclasses.fields(kind)}:
        raise UsageError(
            f"A scene {dict(values)} is unknown.", "Write it with DegradationParameters.to_dict of this version."
        )
    return kind(**values)


def _check_ranges(config: SceneConfig, bounds: Mapping[str, Range]) -> None:
    for name, (least, most) in bounds.items():
        low, high = getattr(config, name)
        if not least <= low <= high <= most:
            raise UsageError(f"{name} ({low}, {high}) is no range within {least}..{most}.")
