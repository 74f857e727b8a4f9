"""What is done to a picture, and how it is drawn: ranges, presets, and counter-based sampling.

The distribution is that of blind restoration training (GFPGAN, CodeFormer, IQPIR): Gaussian blur,
downsampling, Gaussian noise, JPEG, upsampling, and for colourisation a colour shift, grey or jitter. For other
tasks a scene comes first: darkness, water, or light from behind (``scenes``).

Every draw is ``f(seed, epoch, index, stream)``: Philox is keyed by the first two and counted by the others,
so that any worker, in any order, gives a sample the same degradation, and four numbers replay it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from iqpir.config import digest
from iqpir.degradation.colours import JITTER_DRAWS, Jitter, draw_jitter, jitter_from
from iqpir.degradation.scenes import (
    SCENE_DRAWS,
    BacklitConfig,
    LowLightConfig,
    Scene,
    SceneConfig,
    UnderwaterConfig,
    draw_scene,
    scene_from,
)
from iqpir.errors import UsageError

KernelKind = Literal["iso", "aniso"]
Range = tuple[float, float]

_WORD = 2**64
_KEYED_EPOCH = _WORD - 1
_DRAWS = 16


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """Ranges of one distribution of degradations; each is drawn uniformly."""

    image_size: int = 512
    """Side in pixels of the pictures that the ranges are meant for; ``scaled`` converts them."""
    kernel_size: int = 41
    """Side of the blur kernel, odd."""
    kernels: tuple[KernelKind, ...] = ("iso", "aniso")
    """Shapes of the Gaussian blur."""
    kernel_probabilities: tuple[float, ...] = (0.5, 0.5)
    """Probability of each of ``kernels``; they sum to 1."""
    blur_sigma: Range = (1.0, 15.0)
    """Standard deviation of the blur in pixels; anisotropic blur draws one for each axis."""
    downsample: Range = (4.0, 30.0)
    """Factor by which the side shrinks before noise and JPEG."""
    noise: Range = (0.0, 20.0)
    """Standard deviation of the noise, in levels of 0..255."""
    jpeg: tuple[int, int] = (30, 80)
    """JPEG quality: from the first, up to but not including the second (the published draw)."""
    colour_shift_probability: float = 0.0
    """Probability that each channel is shifted by its own offset."""
    colour_shift: float = 20.0
    """Largest offset, in levels of 0..255."""
    gray_probability: float = 0.0
    """Probability that the colours are taken away."""
    jitter_probability: float = 0.0
    """Probability that brightness, contrast, saturation and hue are changed."""
    shot: Range = (0.0, 0.0)
    """Variance that the noise has more, for each unit of light in [0, 1]; in squares of [0, 1]."""
    scene: SceneConfig | None = None
    """What light does before the camera; None: nothing."""

    def __post_init__(self) -> None:
        for name, low_bound in (("blur_sigma", 1e-3), ("downsample", 1.0), ("noise", 0.0), ("shot", 0.0)):
            low, high = getattr(self, name)
            if not low_bound <= low <= high or not math.isfinite(high):
                raise UsageError(f"{name} ({low}, {high}) is no range from {low_bound} upwards.")
        if not 1 <= self.jpeg[0] < self.jpeg[1] <= 101:
            raise UsageError(f"jpeg {self.jpeg} must rise within 1..101; the second is excluded.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UsageError(f"kernel_size {self.kernel_size} is not odd and positive.")
        self._check_kernels()
        for name in ("colour_shift_probability", "gray_probability", "jitter_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name} {getattr(self, name)} is outside [0, 1].")

    def _check_kernels(self) -> None:
        unknown = sorted(set(self.kernels) - {"iso", "aniso"})
        if unknown or not self.kernels:
            raise UsageError(f"kernels {unknown or 'is empty'} is unknown.", "Choose iso, aniso or both.")
        shares = self.kernel_probabilities
        if len(shares) != len(self.kernels) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise UsageError(
                f"kernel_probabilities {shares} must be one share for each of {self.kernels}, summing to 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; fields of ``_LATER`` only where they are used, so that earlier digests stay."""
        values = _plain(self)
        if self.scene is not None:
            values["scene"] = {"kind": type(self.scene).__name__, **values["scene"]}
        return values

    def digest(self) -> str:
        """12 hex digits that change with any field."""
        return digest(self.to_dict())


_LATER = frozenset(["jitter_probability", "shot", "scene", "jitter"])
"""Fields that came later: left out of what is written where they have their default."""


def _plain(config: "DegradationConfig | DegradationParameters") -> dict[str, Any]:
    """Fields as JSON values, without those of ``_LATER`` that change nothing."""
    unused = {
        field.name
        for field in dataclasses.fields(config)
        if field.name in _LATER and getattr(config, field.name) == field.default
    }
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {key: value for key, value in values.items() if key not in unused}


PRESETS: dict[str, DegradationConfig] = {
    # Stage 2, and the large one of stage 3 (published).
    "faces": DegradationConfig(),
    # The small one of stage 3 (published).
    "fidelity": DegradationConfig(blur_sigma=(0.1, 10.0), downsample=(1.0, 12.0), noise=(0.0, 15.0), jpeg=(60, 100)),
    # Ours: pictures without one known structure keep enough detail to say what they show.
    "natural": DegradationConfig(blur_sigma=(0.2, 6.0), downsample=(1.0, 8.0), noise=(0.0, 15.0), jpeg=(40, 95)),
    # Ours, for small crops of natural pictures: 24 to 28 dB in the mean.
    "tiny32": DegradationConfig(
        image_size=32,
        kernel_size=9,
        blur_sigma=(0.5, 2.0),
        downsample=(1.0, 3.0),
        noise=(2.0, 15.0),
        jpeg=(35, 85),
    ),
    "tiny64": DegradationConfig(
        image_size=64,
        kernel_size=13,
        blur_sigma=(0.5, 2.8),
        downsample=(1.0, 4.0),
        noise=(2.0, 15.0),
        jpeg=(35, 85),
    ),
    # Ours, for small pictures of 128 pixels or so, between the tiny ones and natural.
    "small": DegradationConfig(
        image_size=128,
        kernel_size=21,
        blur_sigma=(0.4, 4.0),
        downsample=(1.0, 5.0),
        noise=(1.0, 15.0),
        jpeg=(35, 90),
    ),
    # The published colourisation: the ranges of faces, and colours that change or go.
    "colourisation": DegradationConfig(colour_shift_probability=0.3, gray_probability=0.01, jitter_probability=0.3),
    # Ours, for the paper's other tasks: the scene is the degradation, the camera is a good one.
    "low_light": DegradationConfig(
        kernel_size=13,
        blur_sigma=(0.1, 1.0),
        downsample=(1.0, 1.0),
        noise=(0.0, 5.0),
        shot=(0.0, 0.004),
        jpeg=(75, 101),
        scene=LowLightConfig(),
    ),
    "underwater": DegradationConfig(
        kernel_size=13,
        blur_sigma=(0.1, 2.0),
        downsample=(1.0, 2.0),
        noise=(0.0, 5.0),
        jpeg=(70, 101),
        scene=UnderwaterConfig(),
    ),
    "backlit": DegradationConfig(
        kernel_size=13,
        blur_sigma=(0.1, 1.0),
        downsample=(1.0, 1.0),
        noise=(0.0, 5.0),
        shot=(0.0, 0.002),
        jpeg=(75, 101),
        scene=BacklitConfig(),
    ),
}


def degradation_preset(name: str) -> DegradationConfig:
    """The degradation called ``name``.

    Raises:
        UsageError: no preset has that name.
    """
    if name not in PRESETS:
        raise UsageError(f"Unknown degradation {name!r}.", f"Choose among {', '.join(PRESETS)}.")
    return PRESETS[name]


def scaled(config: DegradationConfig, image_size: int) -> DegradationConfig:
    """``config`` for pictures of another side: what shrinks with a picture is scaled, noise and JPEG are not.

    The kernel keeps at least 7 pixels, and the shrunken picture a side of at least 8 pixels.

    Args:
        config: ranges for pictures of ``config.image_size``.
        image_size: the wanted side in pixels, at least 8.

    Raises:
        UsageError: ``image_size`` is below 8.
    """
    if image_size < 8:
        raise UsageError(f"image_size {image_size} is below 8.")
    if image_size == config.image_size:
        return config
    ratio = image_size / config.image_size
    smallest, largest = (factor * ratio for factor in config.downsample)
    # Downsampling by 2 stays possible wherever the given ranges allow it.
    largest = max(largest, min(2.0, config.downsample[1]))
    limit = max(1.0, image_size / 8)
    return dataclasses.replace(
        config,
        image_size=image_size,
        kernel_size=max(7, 2 * round((config.kernel_size * ratio - 1) / 2) + 1),
        blur_sigma=(max(1e-3, config.blur_sigma[0] * ratio), max(1e-3, config.blur_sigma[1] * ratio)),
        downsample=(min(max(1.0, smallest), limit), min(largest, limit)),
    )


@dataclass(frozen=True, kw_only=True)
class DegradationParameters:
    """One drawn degradation. With the picture it decides the degraded picture, noise included."""

    kernel: KernelKind
    kernel_size: int
    sigma_x: float
    """Standard deviation in pixels along the first axis of the blur (``iso``: along both)."""
    sigma_y: float
    rotation: float
    """Angle of the blur in radians, -pi to pi; 0 for ``iso``."""
    downsample: float
    """Factor, at least 1."""
    noise: float
    """Standard deviation in levels of 0..255."""
    noise_seed: int
    """Key of the noise, 0 to 2**63 - 1."""
    jpeg: int
    """Quality, 1 to 100."""
    colour_shift: tuple[float, float, float] | None = None
    """Offsets of R, G, B in levels of 0..255, or None."""
    gray: bool = False
    jitter: Jitter | None = None
    """Changes of brightness, contrast, saturation and hue, or None."""
    shot: float = 0.0
    """Variance of the noise for each unit of light, in squares of [0, 1]."""
    scene: Scene | None = None
    """What light does before the camera, or None."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reverses it exactly."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DegradationParameters":
        """Inverse of ``to_dict``.

        Raises:
            UsageError: a key is unknown or missing.
        """
        fields = dataclasses.fields(cls)
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        unknown, missing = set(values) - {field.name for field in fields}, required - set(values)
        if unknown or missing:
            raise UsageError(
                f"Degradation parameters have unknown keys {sorted(unknown)} and lack {sorted(missing)}.",
                "Write them with DegradationParameters.to_dict of this version.",
            )
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for key, read in (("scene", scene_from), ("jitter", jitter_from)):
            if plain.get(key) is not None:
                plain[key] = read(plain[key])
        return cls(**plain)


def sample_parameters(
    config: DegradationConfig, seed: int, epoch: int, index: int, stream: int = 0
) -> DegradationParameters:
    """The degradation of one sample in one epoch, the same on every worker.

    Args:
        config: ranges.
        seed: of the run.
        epoch: how many times the sample was seen before.
        index: global number of the sample.
        stream: tells several degradations of one sample apart (stage 3 draws two).
    """
    generator = _generator(seed, epoch, index, stream)
    # Always the same number of draws, used by position: an option that is off shifts no other draw.
    first = _from_draws(config, generator.random(_DRAWS), int(generator.integers(0, 2**63)))
    # What came later draws later, so that the draws above are what they were in every version.
    jitter, scene = generator.random(JITTER_DRAWS), generator.random(SCENE_DRAWS)
    low, high = config.shot
    return dataclasses.replace(
        first,
        jitter=draw_jitter(jitter) if jitter[0] < config.jitter_probability else None,
        shot=low + (high - low) * float(scene[-1]),
        scene=None if config.scene is None else draw_scene(config.scene, scene),
    )


def parameters_for_key(config: DegradationConfig, seed: int, key: str, stream: int = 0) -> DegradationParameters:
    """A fixed degradation for a sample's key: evaluation pairs depend on no order or number of samples."""
    index = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return sample_parameters(config, seed, _KEYED_EPOCH, index, stream)


def shrunken_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Height and width after downsampling by ``factor``, each at least 1."""
    return max(1, int(height // factor)), max(1, int(width // factor))


def _generator(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    key = np.array([seed % _WORD, epoch % _WORD], dtype=np.uint64)
    # Philox counts up in the first word, so the streams of different (index, stream) never meet.
    counter = np.array([0, 0, index % _WORD, stream % _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _from_draws(config: DegradationConfig, draws: NDArray[np.float64], noise_seed: int) -> DegradationParameters:
    def between(limits: tuple[float, float], position: int) -> float:
        low, high = limits
        return float(low + (high - low) * draws[position])

    shares = np.cumsum(config.kernel_probabilities)
    kind = config.kernels[min(int(np.searchsorted(shares, draws[0], side="right")), len(shares) - 1)]
    sigma_x = between(config.blur_sigma, 1)
    low, high = config.jpeg
    limits = (-config.colour_shift, config.colour_shift)
    shifted = draws[7] < config.colour_shift_probability
    return DegradationParameters(
        kernel=kind,
        kernel_size=config.kernel_size,
        sigma_x=sigma_x,
        sigma_y=sigma_x if kind == "iso" else between(config.blur_sigma, 2),
        rotation=0.0 if kind == "iso" else between((-math.pi, math.pi), 3),
        downsample=between(config.downsample, 4),
        noise=between(config.noise, 5),
        noise_seed=noise_seed,
        jpeg=low + int((high - low) * draws[6]),
        colour_shift=(between(limits, 8), between(limits, 9), between(limits, 10)) if shifted else None,
        gray=bool(draws[11] < config.gray_probability),
    )
