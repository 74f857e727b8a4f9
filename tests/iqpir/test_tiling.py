"""What ``iqpir.tiling`` promises."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iqpir.tiling import Canvas, fading_window, tile_starts


def through_identity(picture: Tensor, tile: int, overlap: int) -> Tensor:
    canvas = Canvas(picture, tile, overlap)
    for number in range(len(canvas.corners)):
        canvas.paste(number, canvas.cut(number))
    return canvas.result()


@given(st.integers(1, 500), st.integers(2, 64), st.data())
def test_tiles_cover_every_pixel_and_share_the_overlap(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    if length <= tile:
        assert starts == [0]
        return
    assert starts[-1] == length - tile
    for before, after in itertools.pairwise(starts):
        assert after > before
        # Rounding to whole pixels may take one of them.
        assert before + tile - after >= overlap - 1
        assert before + tile >= after


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 4), (8, 7), (32, 4)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (8, 8), (9, 8), (33, 70), (64, 31)])
def test_tiles_that_are_left_alone_blend_to_the_picture(height: int, width: int, tile: int, overlap: int) -> None:
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    assert torch.allclose(through_identity(picture, tile, overlap), picture, atol=1e-6)


def test_a_picture_of_one_tile_is_passed_through_bitwise() -> None:
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(through_identity(picture, 16, 4), picture)


def test_the_window_fades_smoothly_and_never_to_zero() -> None:
    window = fading_window(32, 8)
    assert window.shape == (32, 32)
    assert 0 < float(window.min()) < 0.01
    assert torch.equal(window[8:24, 8:24], torch.ones(16, 16))
    profile = window[16]
    assert (profile[:8].diff() > 0).all()
    assert torch.allclose(profile, profile.flip(0))
    # Neighbours that overlap by exactly the fade sum to one.
    assert torch.allclose(profile[:8] + profile[-8:], torch.ones(8), atol=1e-6)


def test_a_seam_between_two_different_answers_is_a_gradual_step() -> None:
    canvas = Canvas(torch.zeros(3, 16, 28), 16, 4)
    assert canvas.corners == [(0, 0), (0, 12)]
    canvas.paste(0, torch.zeros(3, 16, 16))
    canvas.paste(1, torch.ones(3, 16, 16))
    row = canvas.result()[0, 5]
    assert row[:12].max() == 0
    assert row[16:].min() == 1
    assert (row[11:17].diff() > 0).all()
    assert float(row.diff().max()) < 0.5


def test_a_small_picture_is_mirrored_around_its_middle() -> None:
    picture = torch.arange(4.0).expand(3, 4, 4)
    tile = Canvas(picture, 8, 1).cut(0)
    assert tile[0, 0].tolist() == [2, 1, 0, 1, 2, 3, 2, 1]


def test_an_unfinished_picture_has_no_result() -> None:
    canvas = Canvas(torch.zeros(3, 8, 20), 8, 2)
    canvas.paste(0, torch.zeros(3, 8, 8))
    assert not canvas.complete
    with pytest.raises(ValueError, match="2 tiles"):
        canvas.result()
