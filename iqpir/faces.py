"""Faces in whole pictures: aligned to the template that face networks know, restored, and put back without a seam.

Detection is somebody else's affair: ``FaceDetector`` is what it must give. Everything here is geometry, in torch
and numpy, and works on landmarks alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from iqpir.errors import UsageError

Picture = NDArray[np.uint8]
"""uint8 RGB [H, W, 3]."""
Matrix = NDArray[np.float64]
"""[2, 3]: (x, y, 1) of one picture -> (x, y) of another, centres of pixels at whole numbers."""

TEMPLATE = np.array(
    [
        (192.98138, 239.94708),
        (318.90277, 240.1936),
        (256.63416, 314.01935),
        (201.26117, 371.41043),
        (313.08905, 371.15118),
    ]
)
"""Eyes, nose and corners of the mouth in an aligned face of 512 pixels (FFHQ), as CodeFormer has it."""

TEMPLATE_SIDE = 512
BORDER = (135, 133, 132)
"""Colour of what an aligned face shows beyond the picture's border, as published."""
SMALLEST_EYE_DISTANCE = 5.0
"""Pixels; smaller faces are left alone, as published."""


@dataclass(frozen=True)
class Face:
    """One face found in a picture."""

    landmarks: NDArray[np.float64]
    """[5, 2] in pixels, x and y: the eye, then the corner of the mouth, on the left of the picture come first:
    left eye, right eye, nose, left corner, right corner, as the viewer sees them."""
    score: float = 1.0
    """How sure the detector is, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.landmarks.shape != (5, 2) or not np.isfinite(self.landmarks).all():
            raise UsageError(f"Landmarks {self.landmarks.tolist()} are not five points.", "Give x and y of each.")

    @property
    def eye_distance(self) -> float:
        """In pixels."""
        return float(np.linalg.norm(self.landmarks[1] - self.landmarks[0]))


class FaceDetector(Protocol):
    """Finds faces."""

    def __call__(self, picture: Picture) -> Sequence[Face]:
        """Every face in ``picture`` (uint8 RGB [H, W, 3]); none is an empty answer."""


RestoreFaces = Callable[[Sequence[Picture]], Sequence[Picture]]
"""Aligned faces, uint8 RGB [S, S, 3] -> restored ones, alike."""


def similarity(source: NDArray[np.float64], target: NDArray[np.float64]) -> Matrix:
    """The rotation, scale and shift that bring ``source`` closest to ``target`` in least squares; no mirroring.

    Source: Umeyama, IEEE TPAMI 13(4), 1991. (The published code takes the least median of squares.)

    Args:
        source: points [n, 2], not all the same.
        target: as many points [n, 2].

    Raises:
        UsageError: the source points coincide.
    """
    centre, aim = source.mean(axis=0), target.mean(axis=0)
    away, wanted = source - centre, target - aim
    spread = float((away**2).sum())
    if spread < 1e-9:
        raise UsageError("All landmarks of a face coincide.", "Use a detector that finds five points.")
    # In the plane: scale times rotation is one complex number, the ratio of moments.
    cos = float((away * wanted).sum()) / spread
    sin = float((away[:, 0] * wanted[:, 1] - away[:, 1] * wanted[:, 0]).sum()) / spread
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([turn, (aim - turn @ centre)[:, None]], axis=1)


def alignment(face: Face, side: int) -> Matrix:
    """From the picture to the aligned face of ``side`` pixels."""
    ratio = side / TEMPLATE_SIDE
    # The template counts from the centre of the first pixel; sizes scale from its corner.
    return similarity(face.landmarks, (TEMPLATE + 0.5) * ratio - 0.5)


def align(picture: Picture, matrix: Matrix, side: int) -> Picture:
    """The aligned face: uint8 RGB [side, side, 3]; what lies beyond the picture has the published colour."""
    planes = _planes(picture)
    scale = _scale(matrix)
    if scale < 1:
        planes, matrix = _smaller(planes, matrix, scale)
    border = torch.tensor(BORDER, dtype=torch.float32)[:, None, None]
    sampled = _warped(planes - border, _inverse(matrix), (side, side)) + border
    return _levels(sampled)


def paste(picture: Picture, restored: Picture, matrix: Matrix, feather: float = 0.1) -> Picture:
    """``picture`` with the restored face put back; pixels outside the face's square stay as they are.

    Args:
        picture: uint8 RGB [H, W, 3].
        restored: the restored aligned face, uint8 RGB [S, S, 3].
        matrix: from the picture to the aligned face, as ``alignment`` gave it.
        feather: width of the soft border, as a share of S, above 0 and at most 0.5.

    Raises:
        UsageError: ``feather`` is out of range.
    """
    if not 0 < feather <= 0.5:
        raise UsageError(f"feather {feather} is outside (0, 0.5].")
    height, width = picture.shape[:2]
    side = restored.shape[0]
    corners = np.array([(0, 0), (side, 0), (0, side), (side, side)]) - 0.5
    there = _applied(_inverse(matrix), corners)
    left, top = np.maximum(np.floor(there.min(axis=0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(there.max(axis=0)).astype(int) + 1, (width, height))
    if left >= right or top >= bottom:
        return picture.copy()
    planes = torch.cat([_planes(restored), _soft_square(side, feather)[None] * 255])
    scale = _scale(matrix)
    if scale > 1:
        planes, shrinking = _shrunk(planes, 1 / scale)
        matrix = (shrinking @ np.concatenate([matrix, [[0, 0, 1]]]))[:2]
    shift = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]], dtype=np.float64)
    warped = _warped(planes, matrix @ shift, (bottom - top, right - left))
    mask = (warped[3:] / 255).clamp(0, 1)
    part = _planes(picture[top:bottom, left:right])
    result = picture.copy()
    result[top:bottom, left:right] = _levels(part + mask * (warped[:3] - part))
    return result


class FacesRestored(NamedTuple):
    """A picture whose faces were restored."""

    picture: Picture
    faces: int
    """How many; 0 leaves the faces as they were."""


def restore_faces(
    picture: Picture,
    detector: FaceDetector,
    restore: RestoreFaces,
    side: int,
    *,
    background: Callable[[Picture], Picture] | None = None,
    feather: float = 0.1,
    which: Literal["all", "largest"] = "all",
) -> FacesRestored:
    """Find, align, restore and put back the faces of one picture.

    Args:
        picture: uint8 RGB [H, W, 3].
        detector: finds faces in it.
        restore: aligned faces of ``side`` pixels to restored ones, such as ``Restorer.restore_batch``.
        side: pixels of an aligned face; the network's own size.
        background: what becomes of everything else; it stays as it is if None.
        feather: width of the soft border around a face, as a share of ``side``.
        which: every face, or the one whose eyes are farthest apart.
    """
    found = [face for face in detector(picture) if face.eye_distance >= SMALLEST_EYE_DISTANCE]
    # The largest last: where faces overlap, it is in front.
    found.sort(key=lambda face: face.eye_distance)
    chosen = found[-1:] if which == "largest" else found
    result = picture.copy() if background is None else background(picture)
    matrices = [alignment(face, side) for face in chosen]
    aligned = [align(picture, matrix, side) for matrix in matrices]
    restored = restore(aligned) if aligned else []
    for face, matrix in zip(restored, matrices, strict=True):
        result = paste(result, face, matrix, feather)
    return FacesRestored(result, len(chosen))


def _soft_square(side: int, feather: float) -> Tensor:
    """[side, side] in [0, 1]: 1 inside, a raised cosine down to 0 at the border."""
    distance = torch.minimum(torch.arange(side) + 0.5, side - 0.5 - torch.arange(side)) / (feather * side)
    profile = 0.5 - 0.5 * torch.cos(math.pi * distance.clamp(0, 1))
    return torch.outer(profile, profile).float()


def _scale(matrix: Matrix) -> float:
    return float(np.hypot(matrix[0, 0], matrix[1, 0]))


def _inverse(matrix: Matrix) -> Matrix:
    turn = np.linalg.inv(matrix[:, :2])
    return np.concatenate([turn, -turn @ matrix[:, 2:]], axis=1)


def _applied(matrix: Matrix, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(points @ matrix[:, :2].T + matrix[:, 2], dtype=np.float64)


def _shrunk(planes: Tensor, factor: float) -> tuple[Tensor, NDArray[np.float64]]:
    """[C, H, W] at ``factor`` of its size, without aliases, and the matrix [3, 3] from old to new places."""
    height, width = (max(1, round(side * factor)) for side in planes.shape[-2:])
    x, y = width / planes.shape[-1], height / planes.shape[-2]
    shrinking = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
    small = functional.interpolate(planes[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[
        0
    ]
    return small, shrinking


def _smaller(planes: Tensor, matrix: Matrix, scale: float) -> tuple[Tensor, Matrix]:
    small, shrinking = _shrunk(planes, scale)
    return small, matrix @ np.linalg.inv(shrinking)


def _warped(planes: Tensor, matrix: Matrix, size: tuple[int, int]) -> Tensor:
    """Bilinear samples of [C, H, W] at ``matrix`` times each place of a picture of ``size``; 0 beyond the border."""
    height, width = planes.shape[-2:]
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float64)
    places = _applied(matrix, np.stack([x.ravel(), y.ravel()], axis=1))
    grid = (places * 2 + 1) / (width, height) - 1
    shaped = torch.from_numpy(grid.astype(np.float32)).view(1, *size, 2)
    return functional.grid_sample(planes[None], shaped, mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def _planes(picture: Picture) -> Tensor:
    """Float [3, H, W] in 0..255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def _levels(planes: Tensor) -> Picture:
    levels: Picture = planes.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return levels
