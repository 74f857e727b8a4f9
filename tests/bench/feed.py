"""The published way from stored pictures to batches: OpenCV, one picture at a time, every pixel blurred.

Decode, 41 x 41 blur, bilinear shrinking, noise, JPEG, bilinear enlarging, rounding, normalising, in the order
and with the roundings of blind face restoration (GFPGAN, CodeFormer, IQPIR). Written without the project's
degradation, whose parameters and noise it takes, so that it can be an oracle of it.
"""

import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch

from iqpir.degradation.parameters import DegradationParameters

Place = tuple[str, int, int]
"""File, first byte, number of bytes."""


def batches(
    places: Sequence[Place], parameters: Sequence[DegradationParameters], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(HQ, LQ), both float32 [B, 3, H, W] in [-1, 1]."""
    for first in range(0, len(places), batch_size):
        part = slice(first, first + batch_size)
        pairs = [sample(*pair) for pair in zip(places[part], parameters[part], strict=True)]
        yield torch.stack([hq for hq, _ in pairs]), torch.stack([lq for _, lq in pairs])


def sample(place: Place, parameters: DegradationParameters) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair, each float32 [3, H, W] in [-1, 1]."""
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    hq = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(np.float32) / 255
    lq = degrade(hq, parameters)
    lq = np.clip(np.round(lq * 255), 0, 255) / 255
    return normalised(hq), normalised(lq.astype(np.float32))


def degrade(picture: np.ndarray, parameters: DegradationParameters) -> np.ndarray:
    """float32 [H, W, 3], BGR in [0, 1] -> the same kind."""
    height, width = picture.shape[:2]
    small = int(width // parameters.downsample), int(height // parameters.downsample)
    small = max(1, small[0]), max(1, small[1])
    blurred = cv2.filter2D(picture, -1, kernel(parameters))
    shrunken = cv2.resize(blurred, small, interpolation=cv2.INTER_LINEAR)
    noise = np.random.Generator(np.random.Philox(key=parameters.noise_seed))
    grain = noise.standard_normal((small[1], small[0], 3), dtype=np.float32)[..., ::-1]
    noisy = np.clip(shrunken + grain * np.float32(parameters.noise / 255), 0, 1)
    levels = np.rint(noisy * 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, parameters.jpeg])
    compressed = np.float32(cv2.imdecode(data, cv2.IMREAD_COLOR)) / 255
    return cv2.resize(compressed, (width, height), interpolation=cv2.INTER_LINEAR)


def kernel(parameters: DegradationParameters) -> np.ndarray:
    """Gaussian with the two deviations along rotated axes; one deviation for ``iso``."""
    reach = parameters.kernel_size // 2
    across, down = np.meshgrid(np.arange(-reach, reach + 1.0), np.arange(-reach, reach + 1.0))
    if parameters.kernel == "iso":
        weights = np.exp(-(across**2 + down**2) / (2 * parameters.sigma_x**2))
        return weights / weights.sum()
    cos, sin = math.cos(parameters.rotation), math.sin(parameters.rotation)
    turn = np.array([[cos, -sin], [sin, cos]])
    spread = turn @ np.diag([parameters.sigma_x**2, parameters.sigma_y**2]) @ turn.T
    points = np.stack([across, down], axis=-1)
    weights = np.exp(-0.5 * np.einsum("yxi,ij,yxj->yx", points, np.linalg.inv(spread), points))
    return weights / weights.sum()


def normalised(picture: np.ndarray) -> torch.Tensor:
    """BGR [H, W, 3] in [0, 1] -> RGB [3, H, W] in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1)))
    return (tensor - 0.5) / 0.5
