"""Sizes and variants of the restoration network, and the presets that name them.

Defaults are the published ones (IQPIR, arXiv 2603.29773; CodeFormer, arXiv 2206.11253).
No torch here: a configuration can be read, compared and digested anywhere.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from iqpir.errors import UsageError

Conditioning = Literal["none", "add", "adaln"]
Codebooks = Literal["single", "dual"]
Fusion = Literal["add", "attention"]
HqGate = Literal["code", "paper"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything that decides the shapes and the forward pass of one network."""

    image_size: int = 512
    """Side of the square pictures the network is built for, in pixels."""
    base_channels: int = 64
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4, 8)
    """Channels of each resolution level over ``base_channels``; each level halves the side."""
    res_blocks: int = 2
    """Residual blocks per level."""
    attention_sizes: tuple[int, ...] = (16,)
    """Feature sides, in pixels, that have self-attention after each residual block."""
    latent_channels: int = 256
    """Width d of the latent and of a code vector."""
    codebook_size: int = 1024
    """Entries K of each codebook."""
    codebooks: Codebooks = "dual"
    """``dual``: common and HQ+ codebook; ``single``: the common one alone (CodeFormer)."""
    fusion: Fusion = "add"
    """How the HQ+ code joins the common one: ``q1 + alpha*q2``, or cross-attention."""
    residual_hq: bool = False
    """Quantise ``z - q1`` instead of ``z`` with the HQ+ codebook (ours; the paper uses z)."""
    alpha: float = 0.8
    """Weight of the HQ+ code in the sum (paper alpha)."""
    hq_threshold: float = 0.7
    """Quality above which a picture uses the HQ+ codebook (paper S_thr), in [0, 1]."""
    hq_gate: HqGate = "code"
    """Stage 2 and inference: ``code`` adds the HQ+ code always (published code); ``paper`` only above S_thr."""
    conditioning: Conditioning = "add"
    """How the wanted quality enters: added to the latent, adaptive layer norm, or not at all."""
    quality_bins: tuple[int, ...] = (10,)
    """Bins of each conditioning score; one entry: the consensus quality alone."""
    transformer_width: int = 512
    transformer_heads: int = 8
    transformer_layers: int = 9
    connect_sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Feature sides at which stage 3 fuses encoder features into the decoder."""
    tones: int = 0
    """Restored pictures take their means over windows of about so many pixels from the degraded picture (ours);
    0 leaves tones to the generator (published), whose normalisation loses them in small networks."""

    def __post_init__(self) -> None:
        levels = len(self.channel_multipliers)
        if self.image_size % 2 ** (levels - 1):
            raise UsageError(
                f"image_size {self.image_size} cannot be halved {levels - 1} times.",
                "Choose a multiple, or fewer channel_multipliers.",
            )
        if self.transformer_width % self.transformer_heads:
            raise UsageError(
                f"transformer_width {self.transformer_width} is no multiple of "
                f"transformer_heads {self.transformer_heads}."
            )
        unknown = set(self.connect_sizes) - set(self.level_sizes)
        if unknown:
            raise UsageError(
                f"connect_sizes {sorted(unknown)} are no feature sizes of this network.",
                f"Choose among {list(self.level_sizes)}.",
            )
        if not self.quality_bins or min(self.quality_bins) < 1:
            raise UsageError("quality_bins needs at least one positive entry.")
        if not 0.0 <= self.hq_threshold <= 1.0:
            raise UsageError(f"hq_threshold {self.hq_threshold} is outside [0, 1].")
        if not 0 <= self.tones < self.image_size:
            raise UsageError(f"tones {self.tones} is no window inside a picture of {self.image_size} pixels.")

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Feature sides from full resolution down to the latent."""
        return tuple(self.image_size // 2**level for level in range(len(self.channel_multipliers)))

    @property
    def latent_size(self) -> int:
        """Side h of the latent; a picture has h*h tokens."""
        return self.level_sizes[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``NetworkConfig.from_dict`` reverses it."""
        values = dataclasses.asdict(self)
        if not self.tones:
            # Younger than the first checkpoints, whose digests are to stay what they are.
            del values["tones"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NetworkConfig":
        """Inverse of ``to_dict``; unknown keys are errors.

        Raises:
            UsageError: a key that this version does not know.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise UsageError(
                f"Network configuration has unknown keys {sorted(unknown)}.",
                "It was written by another version; install that one.",
            )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def digest(self) -> str:
        """12 hex digits that change with any field."""
        return digest(self.to_dict())


def digest(values: Any, length: int = 12) -> str:
    """First ``length`` hex digits of the sha256 of the canonical JSON of ``values``."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


FIXED_BY_STAGE_1 = (
    "image_size",
    "base_channels",
    "channel_multipliers",
    "res_blocks",
    "attention_sizes",
    "latent_channels",
    "codebook_size",
    "codebooks",
    "fusion",
    "residual_hq",
    "alpha",
    "hq_threshold",
)
"""Fields that give stage 1's weights and codes their meaning: a later stage with others would decode another latent
than the generator has learnt, without an error of shapes (``alpha``, ``residual_hq``, ``hq_threshold``)."""


PRESETS: dict[str, NetworkConfig] = {
    # Sixteen tokens a side: with eight, a minute of training gave 4 dB less and blurred every code.
    "tiny32": NetworkConfig(
        image_size=32,
        base_channels=24,
        channel_multipliers=(1, 2),
        res_blocks=1,
        attention_sizes=(),
        latent_channels=64,
        codebook_size=256,
        transformer_width=96,
        transformer_heads=4,
        transformer_layers=2,
        connect_sizes=(16, 32),
    ),
    "tiny64": NetworkConfig(
        image_size=64,
        base_channels=24,
        channel_multipliers=(1, 2, 2),
        res_blocks=1,
        attention_sizes=(),
        latent_channels=64,
        codebook_size=256,
        transformer_width=96,
        transformer_heads=4,
        transformer_layers=2,
        connect_sizes=(16, 32),
    ),
    "small128": NetworkConfig(
        image_size=128,
        base_channels=32,
        channel_multipliers=(1, 2, 2, 4),
        res_blocks=1,
        attention_sizes=(16,),
        latent_channels=128,
        codebook_size=256,
        transformer_width=256,
        transformer_heads=4,
        transformer_layers=4,
        connect_sizes=(32, 64),
    ),
    "mid256": NetworkConfig(
        image_size=256,
        channel_multipliers=(1, 2, 2, 4, 4),
        codebook_size=512,
        transformer_width=256,
        transformer_layers=6,
        connect_sizes=(32, 64, 128),
    ),
    "iqpir512": NetworkConfig(),
    "codeformer512": NetworkConfig(codebooks="single", conditioning="none", alpha=0.0),
}


def preset(name: str) -> NetworkConfig:
    """The network configuration called ``name``.

    Raises:
        UsageError: no preset has that name.
    """
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}.", f"Choose among {', '.join(PRESETS)}.")
    return PRESETS[name]
