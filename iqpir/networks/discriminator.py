"""PatchGAN discriminator of stages 1 and 3 (arXiv 1611.07004, as used by VQGAN, arXiv 2012.09841)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from iqpir.errors import UsageError
from iqpir.networks.blocks import group_norm


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Size of the discriminator. Defaults are the published ones, for pictures of 512x512."""

    base_channels: int = 64
    """Channels after the first convolution; doubled by each layer up to eight times that."""
    layers: int = 4
    """Convolutions of stride 2; decides the patch that one output judges, and the smallest picture."""
    norm: Literal["batch", "group"] = "batch"
    """``batch`` as published; ``group`` judges each picture by itself, on any number of ranks."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.base_channels < 1:
            raise UsageError(
                f"A discriminator with {self.layers} layers of {self.base_channels} channels is not possible."
            )

    @property
    def smallest_picture(self) -> int:
        """Least side of a picture, in pixels: the last two convolutions take a side of 3 or more."""
        return 3 << self.layers

    @classmethod
    def for_picture(cls, side: int, norm: Literal["batch", "group"] = "batch") -> "DiscriminatorConfig":
        """As many of the published layers as a picture of ``side`` pixels allows.

        Raises:
            UsageError: the side is below 6 pixels.
        """
        for layers in range(4, 0, -1):
            config = cls(layers=layers, norm=norm)
            if config.smallest_picture <= side:
                return config
        raise UsageError(f"Pictures of {side} pixels are too small for a discriminator.", "Use 6 or more.")


class Discriminator(nn.Module):
    """Judges overlapping patches of a picture: large for real ones, small for generated ones."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.base_channels
        widths = [channels * min(2**layer, 8) for layer in range(1, config.layers + 1)]
        stages: list[nn.Module] = [
            nn.Conv2d(3, channels, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for layer, width in enumerate(widths, start=1):
            stride = 1 if layer == config.layers else 2
            stages += [
                nn.Conv2d(channels, width, kernel_size=4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width) if config.norm == "batch" else group_norm(width),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        self.main = nn.Sequential(*stages, nn.Conv2d(channels, 1, kernel_size=4, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1] -> one judgement per patch [B,1,h,w], unbounded.

        Raises:
            UsageError: pictures smaller than ``config.smallest_picture``.
        """
        if min(pictures.shape[2:]) < self.config.smallest_picture:
            raise UsageError(
                f"Pictures of {tuple(pictures.shape[2:])} are too small for {self.config.layers} layers.",
                f"Use {self.config.smallest_picture} pixels or more, or fewer layers.",
            )
        judgements: Tensor = self.main(pictures)
        return judgements
