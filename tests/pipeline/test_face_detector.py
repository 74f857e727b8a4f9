"""OpenCV's detector gives faces in the picture's own pixels; the job restores them, and says where there are none."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iqpir.errors import UsageError, VerificationError
from iqpir.faces import Picture
from pipeline.commits.units import SchedulingConfig
from pipeline.face_detector import FacesConfig, YuNet, faces_from, load_detector
from pipeline.restore import RECORD, RestoreConfig, restore
from tests.pipeline.red_square_detector import POINTS, red_square_detector
from tests.pipeline.tiny_checkpoint import write_checkpoint

HERE = SchedulingConfig(workers=0)
CELLS = ((64, 32), (16, 64))
"""x and y of red cells of 16 pixels."""


def with_red_cells(width: int = 160, height: int = 96) -> Picture:
    picture = np.full((height, width, 3), 128, np.uint8)
    picture[::4, ::4] = 90
    for x, y in CELLS:
        picture[y : y + 16, x : x + 16] = (255, 0, 0)
    picture[0:16, 0:16] = (0, 0, 255)
    return picture


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "red.onnx"
    path.write_bytes(red_square_detector())
    return path


@pytest.mark.parametrize(("width", "height"), [(160, 96), (150, 90)])
def test_faces_are_found_in_rgb_and_in_pixels(weights: Path, width: int, height: int) -> None:
    faces = YuNet(weights.read_bytes())(with_red_cells(width, height))
    corners = sorted((face.landmarks[0] - 16 * np.array(POINTS[0])).tolist() for face in faces)
    assert corners == sorted([float(x), float(y)] for x, y in CELLS)
    for face in faces:
        assert face.eye_distance == 8.0 and face.score > 0.99


def test_a_large_picture_is_searched_smaller_and_answered_in_its_own_pixels(weights: Path) -> None:
    picture = with_red_cells().repeat(10, 0).repeat(10, 1)
    faces = YuNet(weights.read_bytes(), largest_side=160)(picture)
    (first,) = [face for face in faces if face.landmarks[0][0] > 500]
    assert np.abs(first.landmarks[0] - (10 * (64 + 4) + 4.5, 10 * (32 + 4) + 4.5)).max() < 1e-6
    assert first.eye_distance == 80.0


def test_the_surest_face_comes_first_with_its_points_from_left_to_right() -> None:
    rows = np.zeros((2, 15))
    rows[:, 14] = 0.5, 0.9
    rows[1, 4:14] = np.arange(10)
    found = faces_from(rows, (2.0, 3.0))
    assert [face.score for face in found] == [0.9, 0.5]
    assert found[0].landmarks[1].tolist() == [2 * 2.5 - 0.5, 3 * 3.5 - 0.5]


def test_a_detector_that_is_none_is_said_to_be_and_where_to_get_one(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no face detector at .*absent\.onnx.*opencv_zoo"):
        load_detector(FacesConfig(detector=str(tmp_path / "absent.onnx")))
    pointer = tmp_path / "pointer.onnx"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UsageError, match="pointer of Git LFS"):
        load_detector(FacesConfig(detector=str(pointer)))
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(UsageError, match="cannot read the face detector"):
        load_detector(FacesConfig(detector=str(tmp_path / "text.onnx")))
    published = tmp_path / "face_detection_yunet_2023mar.onnx"
    published.write_bytes(weights.read_bytes())
    with pytest.raises(VerificationError, match="the published file 8f2383e4dd3c"):
        load_detector(FacesConfig(detector=str(published)))
    assert load_detector(FacesConfig(detector=str(weights)))[1] == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("fields", [{"score": 1.5}, {"largest_side": 8}, {"feather": 0.0}])
def test_settings_that_make_no_sense_are_usage_errors(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"faces.{next(iter(fields))}"):
        FacesConfig(**fields)  # type: ignore[arg-type]


def test_the_job_restores_faces_and_has_an_error_where_there_are_none(weights: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    Image.fromarray(with_red_cells()).save(source / "faces.png")
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(source / "none.png")
    model = write_checkpoint(tmp_path / "checkpoint") or tmp_path / "checkpoint"
    settings = {"model": str(model), "input": str(source), "output": str(tmp_path / "out"), "scheduling": HERE}
    first = restore(RestoreConfig(**settings, faces=FacesConfig(detector=str(weights))))
    assert (first.restored, first.failed) == (1, 1)
    rows = {row["relpath"]: row for row in map(json.loads, (tmp_path / "out" / RECORD).open())}
    assert rows["none.png"]["error"].startswith("no_face")
    restored, before = np.asarray(Image.open(tmp_path / "out" / "faces.png")), with_red_cells()
    changed = np.abs(restored.astype(int) - before).max(axis=2) > 0
    assert changed[36:44, 68:76].any() and not changed[:, 120:].any()

    again = restore(RestoreConfig(**settings, faces=FacesConfig(detector=str(weights))))
    assert again.skipped == 1
    whole = FacesConfig(detector=str(weights), background="restore")
    assert restore(RestoreConfig(**settings, faces=whole)).restored == 2
    plain = restore(RestoreConfig(**settings))
    assert (plain.restored, plain.skipped) == (2, 0)
