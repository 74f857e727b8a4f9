"""Find faces with YuNet (OpenCV's ``FaceDetectorYN``); its weights are a file of 230 kB that the user names.

YuNet: Wu et al., Machine Intelligence Research 2023; MIT licence. It finds a face by its box and five landmarks,
which is what alignment needs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from iqpir.errors import UsageError, VerificationError
from iqpir.faces import Face, Picture
from pipeline.storage import Storage

READ = "docs/method.md"
KNOWN = {"face_detection_yunet_2023mar.onnx": "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"}
"""sha256 of published files by name; others are taken as they are."""
_SOURCE = "https://github.com/opencv/opencv_zoo/tree/main/models/face_detection_yunet"
_GET = f"Get face_detection_yunet_2023mar.onnx (232589 bytes) from {_SOURCE}."
_POINTER = b"version https://git-lfs"
_OVERLAP, _MOST = 0.3, 5000


@dataclass(frozen=True, kw_only=True)
class FacesConfig:
    """Whether and how faces in whole pictures are restored."""

    detector: str = ""
    """Path or URL of YuNet's .onnx file; empty: pictures are restored as they are, in tiles."""
    background: Literal["keep", "restore"] = "keep"
    """What becomes of everything but the faces; ``keep`` leaves its pixels untouched."""
    which: Literal["all", "largest"] = "all"
    """Every face, or the largest."""
    score: float = 0.7
    """Least certainty of a face, in [0, 1]."""
    largest_side: int = 1280
    """Larger pictures are searched at this side; small faces in them are found less often."""
    feather: float = 0.1
    """Width of the soft border around a face, as a share of it."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:
            raise UsageError(f"faces.score {self.score} is outside [0, 1].")
        if self.largest_side < 32:
            raise UsageError(f"faces.largest_side {self.largest_side} is below 32.")
        if not 0.0 < self.feather <= 0.5:
            raise UsageError(f"faces.feather {self.feather} is outside (0, 0.5].")


class YuNet:
    """A ``FaceDetector``.

    Args:
        weights: content of the .onnx file.
        score: least certainty of a face.
        largest_side: larger pictures are searched at this side.

    Raises:
        UsageError: OpenCV cannot read the weights.
    """

    def __init__(self, weights: bytes, score: float = 0.7, largest_side: int = 1280) -> None:
        self.largest_side = largest_side
        buffer, no_config = np.frombuffer(weights, np.uint8), np.zeros(0, np.uint8)
        try:
            self._network = cv2.FaceDetectorYN.create("onnx", buffer, no_config, (320, 320), score, _OVERLAP, _MOST)
        except cv2.error as error:
            raise UsageError(f"OpenCV {cv2.__version__} cannot read the face detector: {error.err}.", _GET) from error

    def __call__(self, picture: Picture) -> Sequence[Face]:
        """Every face in ``picture`` (uint8 RGB [H, W, 3]), the surest first."""
        height, width = picture.shape[:2]
        factor = min(1.0, self.largest_side / max(height, width))
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        searched = cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if factor < 1 else picture
        self._network.setInputSize(size)
        _, rows = self._network.detect(np.ascontiguousarray(searched[:, :, ::-1]))
        found = np.zeros((0, 15)) if rows is None else np.asarray(rows, dtype=np.float64)
        return faces_from(found, (width / size[0], height / size[1]))


def faces_from(rows: NDArray[np.float64], scale: tuple[float, float]) -> list[Face]:
    """Faces from YuNet's rows [n, 15]: box, five points from the left of the picture to the right, score.

    Args:
        rows: in pixels of the searched picture.
        scale: size of the whole picture over that of the searched one, in x and y.
    """
    points = (rows[:, 4:14].reshape(-1, 5, 2) + 0.5) * np.asarray(scale) - 0.5
    order = np.argsort(-rows[:, 14], kind="stable")
    return [Face(points[number], float(rows[number, 14])) for number in order]


def load_detector(config: FacesConfig) -> tuple[YuNet, str]:
    """The detector, and the sha256 of its weights.

    Raises:
        UsageError: there is no such file, or it is none that OpenCV reads.
        VerificationError: a published file that is not what was published.
    """
    path = PurePosixPath(config.detector)
    folder = config.detector[: -len(path.name)].rstrip("/") or "."
    storage = Storage.open(folder)
    if not storage.exists(path.name):
        raise UsageError(f"There is no face detector at {config.detector}.", _GET, READ)
    data = storage.read(path.name)
    found = hashlib.sha256(data).hexdigest()
    if data.startswith(_POINTER):
        raise UsageError(f"{config.detector} is a pointer of Git LFS, not the file itself.", _GET, READ)
    expected = KNOWN.get(path.name, found)
    if found != expected:
        raise VerificationError(
            f"{config.detector} has sha256 {found[:12]}, the published file {expected[:12]}.", _GET, READ
        )
    return YuNet(data, config.score, config.largest_side), found
