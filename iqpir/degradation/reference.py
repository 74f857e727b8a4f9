"""The degradation one picture at a time with OpenCV: the published chain, the oracle of the batched one."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from iqpir.degradation.kernels import blur_kernel, noise_levels
from iqpir.degradation.parameters import DegradationParameters, shrunken_size


def degrade(picture: NDArray[np.uint8], parameters: DegradationParameters) -> NDArray[np.uint8]:
    """Blur, shrink, add noise, compress, enlarge, and shift or remove the colours.

    Args:
        picture: uint8 [H, W, 3], RGB.
        parameters: from ``sample_parameters``.

    Returns:
        uint8 [H, W, 3], RGB: the degraded picture at the size of ``picture``.
    """
    height, width = picture.shape[:2]
    low_height, low_width = shrunken_size(height, width, parameters.downsample)
    image: NDArray[Any] = picture[..., ::-1].astype(np.float32) / np.float32(255)
    image = cv2.filter2D(image, -1, blur_kernel(parameters))
    image = cv2.resize(image, (low_width, low_height), interpolation=cv2.INTER_LINEAR)
    image = np.clip(image + noise_levels(parameters, low_height, low_width)[..., ::-1], 0, 1)
    image = _compressed(image, parameters.jpeg)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    if parameters.colour_shift is not None:
        shift = np.asarray(parameters.colour_shift[::-1], dtype=np.float32) / np.float32(255)
        image = np.clip(image + shift, 0, 1)
    if parameters.gray:
        image = np.repeat(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None], 3, axis=2)
    return np.ascontiguousarray(np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)[..., ::-1])


def _compressed(image: NDArray[np.float32], quality: int) -> NDArray[np.float32]:
    """Through JPEG at ``quality``, chroma at half size as OpenCV's encoder has it; BGR in [0, 1]."""
    levels = np.rint(image * np.float32(255)).astype(np.uint8)
    _, encoded = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return np.asarray(decoded, dtype=np.float32) / np.float32(255)
