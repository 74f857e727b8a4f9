"""Faces are aligned to the template and put back where they were, for landmarks that are given."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from iqpir.errors import UsageError
from iqpir.faces import (
    BORDER,
    TEMPLATE,
    Face,
    Picture,
    align,
    alignment,
    paste,
    restore_faces,
    similarity,
)
from iqpir.networks.restoration_network import build
from iqpir.pixels import encode_png
from iqpir.restorer import Restorer

SIDE = 64


def placed(scale: float, angle: float, shift: tuple[float, float]) -> NDArray[np.float64]:
    """The template's points scaled, turned and shifted into a picture."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return TEMPLATE @ np.array([[cos, sin], [-sin, cos]]) + shift


def smooth(height: int, width: int) -> Picture:
    """Waves of no less than 40 pixels: resampling them costs little."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + phase) + np.cos(y / 11 - phase) for phase in (0.0, 1.0, 2.0)]
    return (128 + 50 * np.stack(waves, 2)).astype(np.uint8)


def drawn_face(points: NDArray[np.float64], size: tuple[int, int]) -> Picture:
    """Dots of one colour each at the five points."""
    image = Image.new("RGB", size, (90, 90, 90))
    draw = ImageDraw.Draw(image)
    radius = np.linalg.norm(points[1] - points[0]) / 8
    for (x, y), colour in zip(points, COLOURS, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return np.asarray(image)


COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))


@pytest.mark.parametrize(("scale", "angle"), [(0.5, 0.0), (0.2, 0.6), (3.0, -2.5)])
def test_a_similarity_is_found_exactly_and_mirrors_nothing(scale: float, angle: float) -> None:
    points = placed(scale, angle, (40.0, -7.0))
    matrix = similarity(points, TEMPLATE)
    assert np.abs(points @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE).max() < 1e-9
    turn = matrix[:, :2]
    assert abs(np.linalg.det(turn) - 1 / scale**2) < 1e-9
    assert np.allclose(turn @ turn.T, np.eye(2) / scale**2)
    mirrored = similarity(points * (-1, 1), TEMPLATE)
    assert np.linalg.det(mirrored[:, :2]) > 0


def test_noise_in_the_landmarks_is_averaged(rng: np.random.Generator) -> None:
    points = placed(0.5, 0.3, (10.0, 20.0))
    exact = similarity(points, TEMPLATE)
    noisy = similarity(points + rng.normal(0, 0.5, (5, 2)), TEMPLATE)
    # No other similarity nearby is closer to the noisy points than the one that was found.
    assert np.abs(exact - noisy)[:, :2].max() < 0.1
    worse = noisy + np.array([[0.01, 0.0, 0.0], [0.0, 0.01, 0.0]])
    cost = [((points @ m[:, :2].T + m[:, 2] - TEMPLATE) ** 2).sum() for m in (exact, worse)]
    assert cost[0] < cost[1]


@pytest.mark.parametrize(
    ("scale", "angle", "size"), [(0.25, 0.2, (200, 160)), (0.6, -0.5, (420, 400)), (0.08, 0.0, (90, 70))]
)
def test_the_points_of_a_face_come_to_the_templates_places(scale: float, angle: float, size: tuple[int, int]) -> None:
    centre = TEMPLATE.mean(axis=0)
    middle = placed(scale, angle, (0.0, 0.0)).mean(axis=0)
    points = placed(scale, angle, tuple(np.array(size) / 2 - middle))
    picture = drawn_face(points, size)
    aligned = align(picture, alignment(Face(points), SIDE), SIDE)
    assert aligned.shape == (SIDE, SIDE, 3) and centre.shape == (2,)
    for (x, y), colour in zip((TEMPLATE + 0.5) * SIDE / 512 - 0.5, COLOURS, strict=True):
        found = aligned[round(y), round(x)].astype(int)
        assert np.abs(found - colour).max() < 70, (x, y, found)


def test_beyond_the_picture_an_aligned_face_has_the_published_colour() -> None:
    points = placed(0.25, 0.0, (-60.0, 0.0))
    aligned = align(np.zeros((130, 60, 3), np.uint8), alignment(Face(points), SIDE), SIDE)
    assert aligned[32, 2].tolist() == list(BORDER)
    assert aligned[32, 40].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("scale", "angle"), [(0.125, 0.0), (0.25, 0.4), (0.5, -0.3), (0.06, 0.0)])
def test_an_unchanged_face_put_back_leaves_the_picture_as_it_was(scale: float, angle: float) -> None:
    picture = smooth(420, 440)
    matrix = alignment(Face(placed(scale, angle, (90.0, 120.0))), 128)
    result = paste(picture, align(picture, matrix, 128), matrix)
    # The fewer pixels of the crop a pixel of the picture has, the less of the picture the crop holds.
    assert np.abs(result.astype(int) - picture).mean() < 1.0
    assert np.abs(result.astype(int) - picture).max() <= (4 if scale <= 0.25 else 16)


def test_outside_the_face_no_pixel_changes_and_inside_it_is_the_restored_one() -> None:
    picture = smooth(200, 200)
    matrix = alignment(Face(placed(0.25, 0.3, (60.0, 30.0))), SIDE)
    red = np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8)
    before = picture.copy()
    result = paste(picture, red, matrix, feather=0.1)
    assert np.array_equal(picture, before)
    y, x = np.mgrid[0:200, 0:200]
    places = np.stack([x, y], 2) @ matrix[:, :2].T + matrix[:, 2]
    outside = ((places < -1.0) | (places > SIDE)).any(axis=2)
    margin = 0.1 * SIDE + 1
    inside = ((places > margin) & (places < SIDE - 1 - margin)).all(axis=2)
    assert outside.sum() > 5000 and inside.sum() > 5000
    assert np.array_equal(result[outside], picture[outside])
    assert (np.abs(result[inside].astype(int) - (255, 0, 0)) <= 1).all()


def test_the_border_of_a_face_fades_without_a_step() -> None:
    grey = np.full((200, 200, 3), 100, np.uint8)
    matrix = alignment(Face(placed(0.25, 0.0, (30.0, 30.0))), SIDE)
    result = paste(grey, np.full((SIDE, SIDE, 3), 200, np.uint8), matrix, feather=0.25).astype(int)
    steps = np.abs(np.diff(result[..., 0], axis=1))
    assert result.max() == 200 and result.min() == 100
    # A raised cosine over a quarter of 128 pixels rises by 100 * pi / 2 / 32 at most.
    assert steps.max() <= 6
    hard = paste(grey, np.full((SIDE, SIDE, 3), 200, np.uint8), matrix, feather=0.02).astype(int)
    assert np.abs(np.diff(hard[..., 0], axis=1)).max() > 20


def test_a_face_at_the_border_is_cut_and_one_beyond_it_changes_nothing() -> None:
    picture = smooth(100, 100)
    red = np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8)
    cut = paste(picture, red, alignment(Face(placed(0.2, 0.0, (-50.0, -50.0))), SIDE))
    assert (cut[0, 0] == (255, 0, 0)).all() and np.array_equal(cut[80:, 80:], picture[80:, 80:])
    away = paste(picture, red, alignment(Face(placed(0.2, 0.0, (500.0, 0.0))), SIDE))
    assert np.array_equal(away, picture)


class Given:
    """A detector that knows the faces."""

    def __init__(self, *scales_and_shifts: tuple[float, float]) -> None:
        self.faces = [Face(placed(scale, 0.0, (shift, 20.0))) for scale, shift in scales_and_shifts]

    def __call__(self, picture: Picture) -> Sequence[Face]:
        return self.faces


def inverted(faces: Sequence[Picture]) -> list[Picture]:
    return [255 - face for face in faces]


def test_every_face_is_restored_and_the_rest_is_kept() -> None:
    picture = smooth(160, 400)
    detector = Given((0.2, 10.0), (0.25, 200.0), (0.02, 350.0))
    result = restore_faces(picture, detector, inverted, SIDE)
    # The third has eyes 2.5 pixels apart.
    assert result.faces == 2
    changed = np.abs(result.picture.astype(int) - picture).max(axis=2) > 0
    assert changed[60, 60] and changed[80, 260] and not changed[:, 345:].any() and not changed[:, 118:195].any()
    largest = restore_faces(picture, detector, inverted, SIDE, which="largest")
    assert largest.faces == 1 and np.array_equal(largest.picture[:, :190], picture[:, :190])


def test_without_a_face_the_picture_is_kept_and_said_to_have_none() -> None:
    picture = smooth(50, 50)
    result = restore_faces(picture, Given(), lambda faces: pytest.fail("nothing to restore"), SIDE)
    assert result.faces == 0 and np.array_equal(result.picture, picture) and result.picture is not picture


def test_the_background_may_be_restored_too() -> None:
    picture = smooth(160, 200)
    result = restore_faces(picture, Given((0.2, 10.0)), lambda faces: list(faces), SIDE, background=lambda p: 255 - p)
    assert np.array_equal(result.picture[:, 130:], 255 - picture[:, 130:])
    assert np.abs(result.picture[60:80, 50:80].astype(int) - picture[60:80, 50:80]).mean() < 3


def test_a_restorer_restores_the_faces_of_a_picture_of_any_kind() -> None:
    torch.manual_seed(2)
    restorer = Restorer(build("tiny32"))
    picture, detector = smooth(160, 400), Given((0.2, 10.0), (0.25, 200.0))
    expected = restore_faces(picture, detector, lambda faces: restorer.restore_batch(faces, 0.3), 32, which="largest")
    for given in (picture, Image.fromarray(picture), encode_png(picture)):
        found, faces = restorer.restore_faces(given, detector, 0.3, which="largest")  # type: ignore[arg-type]
        assert faces == 1 and np.array_equal(found, expected.picture)
    assert not np.array_equal(expected.picture, picture) and np.array_equal(expected.picture[:, :190], picture[:, :190])
    whole = restorer.restore_faces(picture, Given(), 0.3, background="restore")
    assert whole.faces == 0 and np.array_equal(whole.picture, restorer.restore(picture, 0.3))


def test_landmarks_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="five points"):
        Face(np.zeros((4, 2)))
    with pytest.raises(UsageError, match="five points"):
        Face(np.full((5, 2), np.nan))
    with pytest.raises(UsageError, match="coincide"):
        alignment(Face(np.ones((5, 2))), SIDE)
    with pytest.raises(UsageError, match=r"feather 0\.6"):
        paste(smooth(9, 9), smooth(9, 9), np.eye(2, 3), feather=0.6)
