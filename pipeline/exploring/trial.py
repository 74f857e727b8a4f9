"""Try a model on one picture: degrade it if asked, restore it at a setting of the dials."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from iqpir.degradation.parameters import PRESETS, degradation_preset, parameters_for_key, scaled
from iqpir.degradation.reference import degrade
from iqpir.restorer import Restorer

AS_IT_IS = "as it is"
DEGRADATIONS = (AS_IT_IS, *sorted(PRESETS))
"""What may be done to a picture before it is restored."""


def degraded(picture: NDArray[np.uint8], preset: str, seed: int, image_size: int) -> NDArray[np.uint8]:
    """The picture as a training would have seen it; equal pictures and seeds give equal ones.

    Args:
        picture: uint8 RGB [H,W,3].
        preset: of ``DEGRADATIONS``.
        seed: another one is another draw.
        image_size: of the network, to which the preset is scaled.
    """
    if preset == AS_IT_IS:
        return picture
    key = hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()[:32]
    return degrade(picture, parameters_for_key(scaled(degradation_preset(preset), image_size), seed, key))


def tried(
    restorer: Restorer, picture: NDArray[np.uint8], preset: str, seed: int, quality: float, fidelity: float
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What went in and what came out, both uint8 RGB of the picture's size.

    Raises:
        UsageError: a dial beyond its ends, or a fidelity that the model has no modules for.
    """
    before = degraded(picture, preset, seed, restorer.image_size)
    return before, restorer.restore(before, quality, fidelity)
