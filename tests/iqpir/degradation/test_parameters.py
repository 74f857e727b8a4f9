"""What ``iqpir.degradation.parameters`` promises."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from iqpir.degradation.colours import STEPS
from iqpir.degradation.parameters import (
    PRESETS,
    DegradationConfig,
    DegradationParameters,
    degradation_preset,
    parameters_for_key,
    sample_parameters,
    scaled,
    shrunken_size,
)
from iqpir.degradation.scenes import BacklitConfig, LowLightConfig, UnderwaterConfig
from iqpir.errors import UsageError

COLOURISATION = dataclasses.replace(PRESETS["faces"], colour_shift_probability=0.3, gray_probability=0.1)


def drawn(config: DegradationConfig, count: int = 4000) -> list[DegradationParameters]:
    return [sample_parameters(config, seed=1, epoch=0, index=index) for index in range(count)]


def test_a_draw_depends_on_its_four_numbers_and_on_nothing_else() -> None:
    config = PRESETS["faces"]
    first = sample_parameters(config, 1, 2, 3)
    sample_parameters(config, 9, 9, 9)
    np.random.default_rng(0).random(10)
    assert sample_parameters(config, 1, 2, 3) == first
    neighbours = [
        sample_parameters(config, 2, 2, 3),
        sample_parameters(config, 1, 3, 3),
        sample_parameters(config, 1, 2, 4),
        sample_parameters(config, 1, 2, 3, stream=1),
        sample_parameters(config, 1, 3, 2),
    ]
    assert len({first.noise_seed, *(other.noise_seed for other in neighbours)}) == 6
    assert len({first.downsample, *(other.downsample for other in neighbours)}) == 6


def test_one_draw_is_what_it_was_in_every_version() -> None:
    parameters = sample_parameters(PRESETS["faces"], seed=7, epoch=1, index=42)
    assert parameters.to_dict() == EXPECTED


@pytest.mark.parametrize("name", ["faces", "fidelity"])
def test_the_published_ranges_are_drawn_uniformly(name: str) -> None:
    config = PRESETS[name]
    draws = drawn(config)
    for field, (low, high) in {
        "sigma_x": config.blur_sigma,
        "downsample": config.downsample,
        "noise": config.noise,
        "jpeg": (config.jpeg[0], config.jpeg[1] - 1),
    }.items():
        values = np.array([getattr(one, field) for one in draws])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
        assert abs(values.std() - (high - low) / 12**0.5) < 0.03 * (high - low)
    shares = np.mean([one.kernel == "aniso" for one in draws])
    assert abs(shares - 0.5) < 0.03


def test_draws_of_one_sample_are_independent() -> None:
    fields = ("sigma_x", "downsample", "noise", "jpeg", "noise_seed")
    table = np.array([[float(getattr(one, field)) for field in fields] for one in drawn(PRESETS["faces"])])
    correlation = np.corrcoef(table.T) - np.eye(len(fields))
    assert np.abs(correlation).max() < 0.06


def test_isotropic_blur_has_one_sigma_and_anisotropic_two_and_an_angle() -> None:
    for one in drawn(PRESETS["faces"], 200):
        if one.kernel == "iso":
            assert (one.sigma_y, one.rotation) == (one.sigma_x, 0.0)
        else:
            assert one.sigma_y != one.sigma_x
            assert -np.pi <= one.rotation <= np.pi


def test_colours_change_as_often_as_asked() -> None:
    assert all(one.colour_shift is None and not one.gray for one in drawn(PRESETS["faces"], 200))
    draws = drawn(COLOURISATION)
    assert abs(np.mean([one.colour_shift is not None for one in draws]) - 0.3) < 0.03
    assert abs(np.mean([one.gray for one in draws]) - 0.1) < 0.03
    shifts = np.array([one.colour_shift for one in draws if one.colour_shift])
    assert -20 <= shifts.min() < -19
    assert 19 < shifts.max() <= 20


def test_an_option_that_is_switched_on_shifts_no_other_draw() -> None:
    plain, coloured = sample_parameters(PRESETS["faces"], 1, 0, 5), sample_parameters(COLOURISATION, 1, 0, 5)
    assert dataclasses.replace(coloured, colour_shift=None, gray=False) == plain


DIGESTS = {
    "faces": "471e2be17074",
    "fidelity": "73a54f46d616",
    "natural": "5040dc92f78d",
    "tiny32": "ccf58e1ac060",
    "tiny64": "4077787222f5",
    "small": "4038ad15d175",
    "colourisation": "b96dcae6b142",
    "low_light": "a8d2d184ffb8",
    "underwater": "f14e4d8ee41d",
    "backlit": "e0053c8e56a3",
}


def test_digests_of_presets_are_what_they_were_in_every_version() -> None:
    assert {name: config.digest() for name, config in PRESETS.items()} == DIGESTS


@pytest.mark.parametrize("name", ["low_light", "underwater", "backlit"])
def test_scenes_are_drawn_uniformly_within_their_ranges(name: str) -> None:
    config = PRESETS[name]
    scenes = [one.scene for one in drawn(config, 2000)]
    ranges = dataclasses.asdict(config.scene)  # type: ignore[call-overload]
    pairs = {field: ranges[field.split("_")[0]] for field in vars(scenes[0]) if field.split("_")[0] in ranges}
    assert len(pairs) >= 3
    for field, (low, high) in pairs.items():
        values = np.array([getattr(scene, field) for scene in scenes])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.04 * (high - low)
    if name == "underwater":
        counts = {water: sum(scene.water == water for scene in scenes) for water in ranges["waters"]}  # type: ignore[union-attr]
        assert min(counts.values()) > 2000 / len(counts) * 0.7 and sum(counts.values()) == 2000


def test_a_scene_a_jitter_and_shot_noise_shift_no_other_draw() -> None:
    plain = PRESETS["faces"]
    rich = dataclasses.replace(plain, scene=UnderwaterConfig(), shot=(0.001, 0.002), jitter_probability=1.0)
    for index in range(20):
        one = sample_parameters(rich, 1, 0, index)
        assert one.scene is not None and one.jitter is not None and one.shot > 0
        bare = dataclasses.replace(one, scene=None, jitter=None, shot=0.0)
        assert bare == sample_parameters(plain, 1, 0, index)


def test_colours_are_jittered_as_often_as_published_and_in_any_order() -> None:
    jitters = [one.jitter for one in drawn(PRESETS["colourisation"])]
    present = [jitter for jitter in jitters if jitter is not None]
    assert abs(len(present) / len(jitters) - 0.3) < 0.03
    assert len({jitter.order for jitter in present}) == 24
    assert all(set(jitter.order) == set(STEPS) for jitter in present)
    for name, (low, high) in {"brightness": (0.5, 1.5), "saturation": (0.0, 1.5), "hue": (-0.1, 0.1)}.items():
        values = np.array([getattr(jitter, name) for jitter in present])
        assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high


def test_scenes_of_another_version_are_refused() -> None:
    values = sample_parameters(PRESETS["backlit"], 0, 0, 0).to_dict()
    with pytest.raises(UsageError, match="fog"):
        DegradationParameters.from_dict({**values, "scene": {**values["scene"], "kind": "fog"}})
    with pytest.raises(UsageError, match="scene"):
        DegradationParameters.from_dict({**values, "scene": {"kind": "backlit"}})


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (LowLightConfig, {"gamma": (0.5, 2.0)}),
        (LowLightConfig, {"gain": (0.9, 0.1)}),
        (UnderwaterConfig, {"waters": ("I", "X")}),
        (UnderwaterConfig, {"waters": ()}),
        (UnderwaterConfig, {"tilt": (0.0, 1.5)}),
        (BacklitConfig, {"shade": (-1.0, 1.0)}),
    ],
)
def test_ranges_of_scenes_that_make_no_sense_are_usage_errors(config: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        config(**fields)


def test_parameters_survive_json_exactly() -> None:
    drawn_scenes = [one for name in ("low_light", "underwater", "backlit") for one in drawn(PRESETS[name], 20)]
    for one in [*drawn(COLOURISATION, 50), *drawn(PRESETS["colourisation"], 50), *drawn_scenes]:
        assert DegradationParameters.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_parameters_of_another_version_are_refused() -> None:
    values = sample_parameters(PRESETS["faces"], 0, 0, 0).to_dict()
    with pytest.raises(UsageError, match="rain"):
        DegradationParameters.from_dict({**values, "rain": 1})
    del values["jpeg"]
    with pytest.raises(UsageError, match="jpeg"):
        DegradationParameters.from_dict(values)


def test_a_key_has_one_degradation_apart_from_all_epochs() -> None:
    config = PRESETS["natural"]
    first = parameters_for_key(config, 0, "a" * 32)
    assert first == parameters_for_key(config, 0, "a" * 32)
    others = [parameters_for_key(config, 0, "b" * 32), parameters_for_key(config, 1, "a" * 32)]
    assert first.noise_seed not in {other.noise_seed for other in others}


def test_scaling_follows_the_picture_and_keeps_the_shrunken_picture_readable() -> None:
    faces = PRESETS["faces"]
    assert scaled(faces, 512) is faces
    half = scaled(faces, 256)
    assert (half.kernel_size, half.blur_sigma, half.downsample) == (21, (0.5, 7.5), (2.0, 15.0))
    for size in (8, 16, 32, 64, 128, 256, 1024):
        config = scaled(faces, size)
        assert config.kernel_size % 2 == 1
        assert config.kernel_size >= 7
        assert config.image_size == size
        assert min(shrunken_size(size, size, config.downsample[1])) >= 8
        assert (config.noise, config.jpeg) == (faces.noise, faces.jpeg)
    with pytest.raises(UsageError):
        scaled(faces, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"blur_sigma": (2.0, 1.0)},
        {"blur_sigma": (0.0, 1.0)},
        {"downsample": (0.5, 2.0)},
        {"noise": (-1.0, 2.0)},
        {"noise": (0.0, float("inf"))},
        {"jpeg": (0, 50)},
        {"jpeg": (50, 50)},
        {"jpeg": (50, 102)},
        {"kernel_size": 40},
        {"kernels": ("motion", "iso")},
        {"kernels": ()},
        {"kernel_probabilities": (0.5, 0.6)},
        {"kernel_probabilities": (1.0,)},
        {"gray_probability": 1.5},
        {"colour_shift_probability": -0.1},
        {"jitter_probability": 1.1},
        {"shot": (0.1, 0.0)},
    ],
)
def test_ranges_that_make_no_sense_are_usage_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields)).split("_")[0]):
        DegradationConfig(**fields)


def test_presets_are_found_by_name_and_told_apart_by_digest() -> None:
    assert degradation_preset("faces") is PRESETS["faces"]
    assert len({config.digest() for config in PRESETS.values()}) == len(PRESETS)
    with pytest.raises(UsageError, match="faces"):
        degradation_preset("face")


EXPECTED: dict[str, Any] = {
    "kernel": "iso",
    "kernel_size": 41,
    "sigma_x": 12.042351675952633,
    "sigma_y": 12.042351675952633,
    "rotation": 0.0,
    "downsample": 17.789262223220305,
    "noise": 17.69934144995969,
    "noise_seed": 3196776874416339758,
    "jpeg": 76,
    "colour_shift": None,
    "gray": False,
}
