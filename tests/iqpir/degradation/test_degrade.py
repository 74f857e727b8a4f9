"""What the two implementations of the degradation promise, and that they agree."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import data
from torch import Tensor

from iqpir.degradation.batched import KERNEL_TOLERANCE, degrade_batch, shrink
from iqpir.degradation.colours import STEPS, Jitter
from iqpir.degradation.kernels import add_noise, blur_kernel, noise_levels, separable_terms
from iqpir.degradation.parameters import PRESETS, DegradationParameters, sample_parameters, scaled
from iqpir.degradation.reference import degrade
from iqpir.degradation.scenes import JERLOV, Backlit, LowLight, Scene, Underwater
from pipeline.torchvision_ops import ensure_torchvision_operators

MILD = DegradationParameters(
    kernel="iso",
    kernel_size=7,
    sigma_x=1.0,
    sigma_y=1.0,
    rotation=0.0,
    downsample=1.5,
    noise=2.0,
    noise_seed=11,
    jpeg=90,
)


def scene(size: int, seed: int, width: int | None = None) -> NDArray[np.uint8]:
    """Edges, slopes and texture, uint8 [size, width or size, 3]."""
    generator, width = np.random.default_rng(seed), width or size
    y, x = np.mgrid[0:size, 0:width].astype(np.float32) / size
    picture = np.zeros((size, width, 3), np.float32)
    for _ in range(8):
        a, b, c = generator.normal(size=3)
        stripes = np.sin(generator.uniform(4, 50) * (a * x + b * y) + c)
        picture += (stripes > 0.3 * a)[..., None] * generator.normal(size=3) + stripes[..., None] * 0.2
    picture = (picture - picture.min()) / np.ptp(picture)
    return (picture * 255).astype(np.uint8)


def as_tensor(pictures: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def as_levels(pictures: Tensor) -> NDArray[np.float32]:
    return (pictures * 255).permute(0, 2, 3, 1).numpy()


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(-10 * np.log10(np.mean((a / 255.0 - b / 255.0) ** 2) + 1e-12))


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        *[("tiny32", 32, 48), ("tiny64", 64, 24), ("faces", 64, 24), ("fidelity", 128, 8), ("faces", 512, 3)],
        ("small", 128, 8),
        *[("low_light", 64, 24), ("underwater", 64, 24), ("backlit", 64, 24)],
        *[("low_light", 512, 2), ("underwater", 512, 2), ("backlit", 512, 2)],
    ],
)
def test_both_implementations_give_the_same_picture(name: str, size: int, count: int) -> None:
    colours = {"colour_shift_probability": 0.3, "gray_probability": 0.2, "jitter_probability": 0.3}
    config = dataclasses.replace(scaled(PRESETS[name], size), **colours)  # type: ignore[arg-type]
    pictures = [scene(size, seed) for seed in range(count)]
    parameters = [sample_parameters(config, 5, 0, index) for index in range(count)]
    expected = np.stack([degrade(*pair) for pair in zip(pictures, parameters, strict=True)])
    result = degrade_batch(as_tensor(pictures), parameters)
    difference = np.abs(as_levels(result) - expected)
    # In levels of 0..255. A rounding before JPEG that falls the other way may move a block by some levels.
    assert difference.mean() < 0.4
    assert np.median(difference.mean(axis=(1, 2, 3))) < 0.2
    assert result.dtype == torch.float32
    assert np.abs(as_levels(result) - np.rint(as_levels(result))).max() < 1e-3


def test_both_agree_on_pictures_that_are_not_square() -> None:
    picture = scene(40, 1, width=72)
    expected = degrade(picture, MILD)
    assert expected.shape == (40, 72, 3)
    assert np.abs(as_levels(degrade_batch(as_tensor([picture]), [MILD]))[0] - expected).mean() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (8, 5)])
def test_both_agree_on_pictures_below_the_kernel(size: tuple[int, int]) -> None:
    picture = scene(9, 2)[: size[0], : size[1]]
    parameters = dataclasses.replace(MILD, kernel_size=13, sigma_x=3.0, downsample=1.0)
    difference = as_levels(degrade_batch(as_tensor([picture]), [parameters]))[0] - degrade(picture, parameters)
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0, 3.7])
@pytest.mark.parametrize("angle", [None, 0.0, 0.7, -2.0])
def test_blur_and_downsampling_are_those_of_opencv(angle: float | None, factor: float) -> None:
    kernel = "iso" if angle is None else "aniso"
    parameters = dataclasses.replace(
        MILD,
        kernel=kernel,
        kernel_size=21,
        sigma_x=2.5,
        sigma_y=6.0,
        rotation=angle or 0.0,
        downsample=factor,
    )
    picture = as_tensor([scene(64, 3)])[0]
    blurred = cv2.filter2D(picture.permute(1, 2, 0).numpy().copy(), -1, blur_kernel(parameters))
    side = int(64 // factor)
    expected = cv2.resize(blurred, (side, side), interpolation=cv2.INTER_LINEAR)
    result = shrink(picture, parameters).permute(1, 2, 0).numpy()
    assert np.abs(result - expected).max() <= KERNEL_TOLERANCE + 1e-5


def test_the_separable_terms_sum_to_the_kernel_within_the_tolerance() -> None:
    for index in range(20):
        parameters = sample_parameters(PRESETS["faces"], 0, 0, index)
        columns, rows = separable_terms(parameters, 1e-3)
        assert np.abs(columns.T @ rows - blur_kernel(parameters)).sum() <= 1e-3
        assert len(columns) == 1 or parameters.kernel == "aniso"


def test_kernels_sum_to_one_and_lie_along_their_angle() -> None:
    parameters = dataclasses.replace(MILD, kernel="aniso", kernel_size=41, sigma_x=6.0, sigma_y=1.0, rotation=np.pi / 4)
    kernel = blur_kernel(parameters)
    assert kernel.shape == (41, 41)
    assert abs(kernel.sum() - 1) < 1e-12
    assert kernel[24, 24] > 100 * kernel[16, 24]
    offsets = np.arange(41) - 20
    assert abs(kernel.sum(axis=0) @ offsets**2 - (36 + 1) / 2) < 0.5


def test_noise_is_decided_by_its_seed_and_has_the_asked_strength() -> None:
    parameters = dataclasses.replace(MILD, noise=10.0)
    noise = noise_levels(parameters, 100, 90)
    assert np.array_equal(noise, noise_levels(parameters, 100, 90))
    assert noise.dtype == np.float32
    assert abs(noise.std() * 255 - 10) < 0.2
    other = noise_levels(dataclasses.replace(parameters, noise_seed=12), 100, 90)
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.03


def test_the_same_parameters_give_the_same_picture_alone_or_in_a_batch() -> None:
    pictures = as_tensor([scene(64, seed) for seed in range(4)])
    parameters = [sample_parameters(PRESETS["tiny64"], 2, 0, index) for index in range(4)]
    together = degrade_batch(pictures, parameters)
    alone = torch.cat([degrade_batch(pictures[i : i + 1], parameters[i : i + 1]) for i in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), degrade_batch(pictures.flip(0), parameters[::-1]))


def test_the_input_is_not_changed() -> None:
    picture, pictures = scene(32, 4), as_tensor([scene(32, 4)])
    degrade(picture, dataclasses.replace(MILD, gray=True, colour_shift=(9.0, 9.0, 9.0)))
    kept = pictures.clone()
    degrade_batch(pictures, [dataclasses.replace(MILD, gray=True, colour_shift=(9.0, 9.0, 9.0))])
    assert torch.equal(pictures, kept)
    assert np.array_equal(picture, scene(32, 4))


def test_gray_takes_the_colours_and_a_shift_moves_each_channel() -> None:
    grey = degrade(scene(32, 5), dataclasses.replace(MILD, gray=True))
    assert (grey == grey[..., :1]).all()
    flat = np.full((32, 32, 3), 128, np.uint8)
    still = dataclasses.replace(MILD, noise=0.0, jpeg=100)
    moved = degrade(flat, dataclasses.replace(still, colour_shift=(10.0, 0.0, -20.0)))
    assert moved[5, 5].tolist() == [138, 128, 108]


STILL = dataclasses.replace(MILD, kernel_size=1, downsample=1.0, noise=0.0, jpeg=100)
"""What is left is the scene, and the rounding of a JPEG."""
WATER = Underwater(water="II", depth=3.0, distance=3.0, tilt=0.0, angle=0.0, veil=0.8, scatter=1.0)
SHADE = Backlit(shade=-3.0, glare=1.0, centre_x=0.5, centre_y=0.5, radius_x=0.25, radius_y=0.25, softness=0.05)


def in_scene(picture: NDArray[np.uint8], scene: Scene) -> NDArray[np.float64]:
    """What both implementations agree the camera sees, in [0, 1]."""
    parameters = dataclasses.replace(STILL, scene=scene)
    seen = degrade(picture, parameters)
    assert np.abs(as_levels(degrade_batch(as_tensor([picture]), [parameters]))[0] - seen).max() <= 4
    return seen / 255.0


def test_low_light_is_the_published_curve() -> None:
    flat = np.full((16, 16, 3), 128, np.uint8)
    dark = in_scene(flat, LowLight(exposure=0.9, gain=0.7, gamma=2.0))
    assert np.abs(dark - 0.7 * (0.9 * 128 / 255) ** 2).max() < 1.5 / 255


def test_water_takes_red_first_and_veils_what_is_far() -> None:
    flat = np.full((16, 16, 3), 200, np.uint8)
    red, green, blue = in_scene(flat, WATER)[8, 8]
    assert red < green - 0.1 and red < blue - 0.1
    black = np.zeros((16, 16, 3), np.uint8)
    near, far = (in_scene(black, dataclasses.replace(WATER, distance=z)).mean() for z in (0.5, 5.0))
    assert near < far - 0.1
    tilted = in_scene(black, dataclasses.replace(WATER, tilt=0.9))
    assert tilted[8, 15].mean() > tilted[8, 0].mean() + 0.05
    # Clear linear light times exp(-a (D + z)), plus the veil.
    attenuation = np.array(JERLOV["II"])
    lost = np.exp(-attenuation * 3.0)
    linear = ((200 / 255 + 0.055) / 1.055) ** 2.4 * lost * lost + 0.8 * lost * (1 - lost)
    expected = 1.055 * linear ** (1 / 2.4) - 0.055
    assert np.abs(in_scene(flat, WATER)[8, 8] - expected).max() < 2 / 255


def test_light_from_behind_darkens_the_subject_and_clips_what_is_behind() -> None:
    flat = np.full((33, 33, 3), 200, np.uint8)
    seen = in_scene(flat, SHADE)
    linear = ((200 / 255 + 0.055) / 1.055) ** 2.4
    assert abs(seen[16, 16, 0] - (1.055 * (linear / 8) ** (1 / 2.4) - 0.055)) < 2 / 255
    assert seen[0, 0, 0] == 1.0 and seen[16, 2, 0] == 1.0


def test_shot_noise_grows_with_the_light() -> None:
    flat = np.concatenate([np.full((64, 64, 3), level, np.float32) for level in (0.1, 0.5)], axis=1)
    shot = add_noise(flat, dataclasses.replace(MILD, noise=0.0, shot=0.004)) - flat
    for half, level in ((shot[:, :64], 0.1), (shot[:, 64:], 0.5)):
        assert abs(half.std() - (0.004 * level) ** 0.5) < 0.002
    floor = add_noise(flat, dataclasses.replace(MILD, noise=5.0, shot=1e-12)) - flat
    assert np.abs(floor - (add_noise(flat, dataclasses.replace(MILD, noise=5.0)) - flat)).max() < 1e-5


@pytest.mark.parametrize("step", ["brightness", "contrast", "saturation", "hue"])
def test_each_change_of_colour_is_that_of_torchvision(step: str) -> None:
    ensure_torchvision_operators()
    peer = pytest.importorskip("torchvision.transforms.functional")
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    picture = scene(24, 8)
    for factor in (-0.08, 0.06) if step == "hue" else (0.6, 1.4):
        jitter = Jitter(order=STEPS, **{**neutral, step: factor})
        parameters = dataclasses.replace(STILL, jitter=jitter)
        without = torch.from_numpy(degrade(picture, STILL).copy()).permute(2, 0, 1).float() / 255
        expected = (getattr(peer, f"adjust_{step}")(without, factor) * 255).permute(1, 2, 0).numpy()
        assert np.abs(degrade(picture, parameters) - expected).mean() < 0.6
        assert np.abs(as_levels(degrade_batch(as_tensor([picture]), [parameters]))[0] - expected).mean() < 0.8


def test_the_order_of_the_changes_counts() -> None:
    factors = {"brightness": 1.5, "contrast": 0.5, "saturation": 1.4, "hue": 0.1}
    pictures = []
    for order in (STEPS, STEPS[::-1]):
        parameters = dataclasses.replace(STILL, jitter=Jitter(order=order, **factors))
        pictures.append(degrade(scene(24, 9), parameters).astype(float))
        assert np.abs(as_levels(degrade_batch(as_tensor([scene(24, 9)]), [parameters]))[0] - pictures[-1]).mean() < 0.6
    assert np.abs(pictures[0] - pictures[1]).mean() > 2


@pytest.mark.parametrize("worse", [{"sigma_x": 2.5}, {"downsample": 4.0}, {"noise": 20.0}, {"jpeg": 10}], ids=str)
def test_each_part_of_the_chain_makes_the_picture_worse(worse: dict[str, float]) -> None:
    picture = scene(64, 6)
    changed = dataclasses.replace(MILD, **worse)  # type: ignore[arg-type]
    assert psnr(picture, degrade(picture, changed)) < psnr(picture, degrade(picture, MILD)) - 0.3


@pytest.mark.parametrize("name", ["tiny32", "tiny64"])
def test_tiny_presets_are_visibly_worse_but_not_destroyed(name: str) -> None:
    config, pictures = PRESETS[name], []
    size, generator = config.image_size, np.random.default_rng(0)
    sources = (data.astronaut(), data.chelsea(), data.coffee())
    while len(pictures) < 60:
        source = sources[len(pictures) % 3]
        top, left = (int(generator.integers(0, side - size)) for side in source.shape[:2])
        crop = source[top : top + size, left : left + size]
        if crop.std() > 15:
            pictures.append(crop)
    values = [psnr(p, degrade(p, sample_parameters(config, 0, 0, i))) for i, p in enumerate(pictures)]
    assert 22 < np.mean(values) < 29
    assert np.percentile(values, 5) > 15


def test_a_picture_without_its_parameters_is_a_programmer_error() -> None:
    with pytest.raises(ValueError, match="2 pictures"):
        degrade_batch(torch.zeros(2, 3, 8, 8), [MILD])
