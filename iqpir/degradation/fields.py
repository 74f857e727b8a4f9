"""Maps over a picture that scenes need, in numpy: both implementations of the degradation share them."""

import math

import numpy as np
from numpy.typing import NDArray

from iqpir.degradation.scenes import JERLOV, Backlit, Underwater

Field = NDArray[np.float32]

LINEAR_KNEE, DISPLAY_KNEE = 0.0031308, 0.04045
"""Where sRGB (IEC 61966-2-1) changes from its line to its power, in linear light and in display values."""


def water_fields(scene: Underwater, height: int, width: int) -> tuple[Field, Field]:
    """Transmission and veil [height, width, 3], RGB in linear light: ``y = x * transmission + veil``."""
    attenuation = np.asarray(JERLOV[scene.water])
    y, x = _coordinates(height, width)
    along = (math.cos(scene.angle) * x + math.sin(scene.angle) * y) / math.sqrt(2)
    distance = (scene.distance * (1 + scene.tilt * along))[..., None]
    lost_above = np.exp(-attenuation * scene.depth)
    direct = lost_above * np.exp(-attenuation * distance)
    veil = scene.veil * lost_above * (1 - np.exp(-scene.scatter * attenuation * distance))
    return direct.astype(np.float32), veil.astype(np.float32)


def exposure_field(scene: Backlit, height: int, width: int) -> Field:
    """Factor [height, width, 1] on linear light: below 1 on the subject, above 1 behind it."""
    y, x = _coordinates(height, width)
    across = ((x + 1) / 2 - scene.centre_x) / scene.radius_x
    down = ((y + 1) / 2 - scene.centre_y) / scene.radius_y
    outside = (np.sqrt(across**2 + down**2) - 1) / scene.softness
    mask = 1 / (1 + np.exp(np.clip(outside, -60, 60)))
    stops = scene.glare + mask * (scene.shade - scene.glare)
    return np.exp2(stops)[..., None].astype(np.float32)


def _coordinates(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows [height, 1] and columns [1, width], centres of pixels, from -1 to 1."""
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    return y[:, None], x[None]
