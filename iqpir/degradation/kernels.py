"""Blur kernels and noise: what both implementations of the degradation share, in numpy."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iqpir.degradation.parameters import DegradationParameters


def blur_kernel(parameters: DegradationParameters) -> NDArray[np.float64]:
    """Gaussian on the integer grid, [k, k], summing to 1.

    ``exp(-x' S^-1 x / 2)`` with ``S = U diag(sigma_x^2, sigma_y^2) U'`` and U the rotation.
    """
    if parameters.kernel == "iso":
        profile = gaussian_profile(parameters.sigma_x, parameters.kernel_size)
        return np.outer(profile, profile)
    radius = parameters.kernel_size // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    cos, sin = math.cos(parameters.rotation), math.sin(parameters.rotation)
    # Coordinates along the axes of the ellipse: there S is diagonal.
    along, across = cos * x + sin * y, cos * y - sin * x
    weights = np.exp(-0.5 * ((along / parameters.sigma_x) ** 2 + (across / parameters.sigma_y) ** 2))
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def gaussian_profile(sigma: float, size: int) -> NDArray[np.float64]:
    """One-dimensional Gaussian on the integer grid, [size], summing to 1."""
    offsets = np.arange(size, dtype=np.float64) - size // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def separable_terms(
    parameters: DegradationParameters, tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The blur as a short sum of separable blurs: ``kernel = sum_r outer(columns[r], rows[r])``.

    Isotropic Gaussians have one term; rotated ones the leading terms of a singular value decomposition.

    Args:
        parameters: which blur.
        tolerance: bound on the sum of absolute errors of the kernel, hence on the error of a pixel in [0, 1].

    Returns:
        columns [r, k] (vertical) and rows [r, k] (horizontal).
    """
    if parameters.kernel == "iso":
        profile = gaussian_profile(parameters.sigma_x, parameters.kernel_size)[None]
        return profile, profile
    kernel = blur_kernel(parameters)
    # Not numpy's: its BLAS wakes a thread a core in every loader process for a matrix of 41 x 41.
    left, strengths, right = (part.numpy() for part in torch.linalg.svd(torch.from_numpy(kernel)))
    columns = (left * strengths).T
    rest = kernel.copy()
    for count in range(1, len(strengths) + 1):
        rest -= np.outer(columns[count - 1], right[count - 1])
        if np.abs(rest).sum() <= tolerance:
            break
    return columns[:count], right[:count]


def noise_levels(parameters: DegradationParameters, height: int, width: int) -> NDArray[np.float32]:
    """Noise [height, width, 3] in RGB order, for pictures in [0, 1]; decided by ``noise_seed`` alone."""
    generator = np.random.Generator(np.random.Philox(key=parameters.noise_seed))
    noise = generator.standard_normal((height, width, 3), dtype=np.float32)
    return noise * np.float32(parameters.noise / 255.0)


def add_noise(image: NDArray[Any], parameters: DegradationParameters) -> NDArray[np.float32]:
    """``image`` [h, w, 3], RGB in [0, 1], with its noise, clipped to [0, 1].

    The variance is ``noise^2 + shot * image`` (Foi et al., IEEE TIP 2008); without ``shot`` it is even.
    """
    noise = noise_levels(parameters, *image.shape[:2])
    if parameters.shot > 0:
        even = np.float32(parameters.noise / 255.0)
        unit = noise_levels(dataclasses.replace(parameters, noise=255.0), *image.shape[:2])
        noise = unit * np.sqrt(np.float32(parameters.shot) * np.maximum(image, 0) + even * even)
    return np.asarray(np.clip(image + noise, 0, 1), dtype=np.float32)
