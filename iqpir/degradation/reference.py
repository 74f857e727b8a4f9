"""The degradation one picture at a time with OpenCV: the published chain, the oracle of the batched one."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from iqpir.degradation.colours import GRAY_WEIGHTS, Jitter
from iqpir.degradation.fields import DISPLAY_KNEE, LINEAR_KNEE, exposure_field, water_fields
from iqpir.degradation.kernels import add_noise, blur_kernel
from iqpir.degradation.parameters import DegradationParameters, shrunken_size
from iqpir.degradation.scenes import LowLight, Scene, Underwater


def degrade(picture: NDArray[np.uint8], parameters: DegradationParameters) -> NDArray[np.uint8]:
    """Light the scene, blur, shrink, add noise, compress, enlarge, and shift, remove or change the colours.

    Args:
        picture: uint8 [H, W, 3], RGB.
        parameters: from ``sample_parameters``.

    Returns:
        uint8 [H, W, 3], RGB: the degraded picture at the size of ``picture``.
    """
    height, width = picture.shape[:2]
    low_height, low_width = shrunken_size(height, width, parameters.downsample)
    image: NDArray[Any] = picture[..., ::-1].astype(np.float32) / np.float32(255)
    if parameters.scene is not None:
        image = _lit(image[..., ::-1], parameters.scene)[..., ::-1]
    image = cv2.filter2D(image, -1, blur_kernel(parameters))
    image = cv2.resize(image, (low_width, low_height), interpolation=cv2.INTER_LINEAR)
    image = add_noise(image[..., ::-1], parameters)[..., ::-1]
    image = _compressed(image, parameters.jpeg)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    if parameters.colour_shift is not None:
        shift = np.asarray(parameters.colour_shift[::-1], dtype=np.float32) / np.float32(255)
        image = np.clip(image + shift, 0, 1)
    if parameters.gray:
        image = np.repeat(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None], 3, axis=2)
    if parameters.jitter is not None:
        image = _jittered(image[..., ::-1], parameters.jitter)[..., ::-1]
    return np.ascontiguousarray(np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)[..., ::-1])


def _compressed(image: NDArray[np.float32], quality: int) -> NDArray[np.float32]:
    """Through JPEG at ``quality``, chroma at half size as OpenCV's encoder has it; BGR in [0, 1]."""
    levels = np.rint(image * np.float32(255)).astype(np.uint8)
    _, encoded = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return np.asarray(decoded, dtype=np.float32) / np.float32(255)


def _lit(image: NDArray[Any], scene: Scene) -> NDArray[np.float32]:
    """What the camera sees of ``image`` [H, W, 3], RGB in [0, 1], in ``scene``."""
    if isinstance(scene, LowLight):
        curve = (np.float32(scene.exposure) * image) ** np.float32(scene.gamma)
        return np.asarray(np.float32(scene.gain) * curve, dtype=np.float32)
    height, width = image.shape[:2]
    linear = np.where(image <= DISPLAY_KNEE, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    if isinstance(scene, Underwater):
        transmission, veil = water_fields(scene, height, width)
        linear = linear * transmission + veil
    else:
        linear = linear * exposure_field(scene, height, width)
    linear = np.clip(linear, 0, 1)
    shown = np.where(linear <= LINEAR_KNEE, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(shown, dtype=np.float32)


def _jittered(image: NDArray[Any], jitter: Jitter) -> NDArray[Any]:
    """``image`` [H, W, 3], RGB in [0, 1], with the changes of colour in their order."""
    weights = np.asarray(GRAY_WEIGHTS, dtype=np.float32)
    for step in jitter.order:
        factor = np.float32(getattr(jitter, step))
        if step == "hue":
            turned = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
            turned[..., 0] = (turned[..., 0] + 360 * factor) % 360
            image = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)
        elif step == "brightness":
            image = image * factor
        else:
            gray = (image * weights).sum(axis=2, keepdims=True, dtype=np.float32)
            image = factor * image + (1 - factor) * (gray.mean() if step == "contrast" else gray)
        image = np.clip(image, 0, 1)
    return image
