"""Encoder and generator of the autoencoder.

Both record, while they are built, after which block the features of each size are read (encoder) or
refined (generator), so that any size of network has the right places without tables of constants.
"""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from iqpir.config import NetworkConfig
from iqpir.networks.blocks import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    convolution,
    group_norm,
)


class Encoder(nn.Module):
    """Pictures to latents.

    ``taps`` maps a feature side to the block whose output is its feature, ``widths`` to its channels.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.taps: dict[int, int] = {}
        self.widths: dict[int, int] = {}
        channels = config.base_channels
        self.blocks.append(convolution(3, channels))
        for size, multiplier in zip(config.level_sizes, config.channel_multipliers, strict=True):
            width = config.base_channels * multiplier
            for _ in range(config.res_blocks):
                self.blocks.append(ResidualBlock(channels, width))
                self.taps[size], self.widths[size] = len(self.blocks) - 1, width
                channels = width
                if size in config.attention_sizes:
                    self.blocks.append(AttentionBlock(channels))
            if size != config.latent_size:
                self.blocks.append(Downsample(channels))
        self.blocks.extend(
            [
                ResidualBlock(channels, channels),
                AttentionBlock(channels),
                ResidualBlock(channels, channels),
                group_norm(channels),
                convolution(channels, config.latent_channels),
            ]
        )

    def forward(self, pictures: Tensor, sizes: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """[B,3,R,R] in [-1,1] -> latent [B,d,h,h] and the features whose side is in ``sizes``."""
        wanted = {self.taps[size]: size for size in sizes}
        features, taps = pictures, {}
        for index, block in enumerate(self.blocks):
            features = block(features)
            if index in wanted:
                taps[wanted[index]] = features
        return features, taps


class Generator(nn.Module):
    """Latents to pictures. ``taps`` maps a feature side to the block after which it may be refined."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.taps: dict[int, int] = {}
        channels = config.base_channels * config.channel_multipliers[-1]
        self.blocks.extend(
            [
                convolution(config.latent_channels, channels),
                ResidualBlock(channels, channels),
                AttentionBlock(channels),
                ResidualBlock(channels, channels),
            ]
        )
        for level in reversed(range(len(config.level_sizes))):
            size = config.level_sizes[level]
            width = config.base_channels * config.channel_multipliers[level]
            for _ in range(config.res_blocks):
                self.blocks.append(ResidualBlock(channels, width))
                # As published: the first residual block of a level, but the last one of the lowest.
                if size == config.latent_size or size not in self.taps:
                    self.taps[size] = len(self.blocks) - 1
                channels = width
                if size in config.attention_sizes:
                    self.blocks.append(AttentionBlock(channels))
            if level > 0:
                self.blocks.append(Upsample(channels))
        self.blocks.extend([group_norm(channels), convolution(channels, 3)])

    @property
    def last_weight(self) -> nn.Parameter:
        """Weight of the last convolution, to which the adversarial weight is balanced (VQGAN)."""
        return self.get_parameter(f"blocks.{len(self.blocks) - 1}.weight")

    def forward(self, latent: Tensor, refine: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """[B,d,h,h] -> [B,3,R,R]; ``refine[size]`` is applied to the features of that side."""
        after = {self.taps[size]: function for size, function in (refine or {}).items()}
        features = latent
        for index, block in enumerate(self.blocks):
            features = block(features)
            if index in after:
                features = after[index](features)
        return features
