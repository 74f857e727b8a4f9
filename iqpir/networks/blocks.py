"""Building blocks of the autoencoder: residual block, attention, resampling.

Tensors are NCHW. Parameter names are those of the published checkpoints (CodeFormer, arXiv 2206.11253).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or as many as divide ``channels`` in narrow networks."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3x3 convolution that keeps the side of its input."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Two times norm, swish, convolution; plus a shortcut (1x1 where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = convolution(channels_in, channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = convolution(channels_out, channels_out)
        self.conv_out = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, features: Tensor) -> Tensor:
        """[B,channels_in,H,W] -> [B,channels_out,H,W]."""
        inner: Tensor = self.conv1(_swish(self.norm1(features)))
        inner = self.conv2(_swish(self.norm2(inner)))
        shortcut: Tensor = features if self.conv_out is None else self.conv_out(features)
        if torch.is_grad_enabled() or inner.dtype != shortcut.dtype:
            return inner + shortcut
        return inner.add_(shortcut)


def _swish(fresh: Tensor) -> Tensor:
    """Swish, in place where no gradient needs ``fresh``: on a CPU new pages for a large result cost 5 times more."""
    return functional.silu(fresh, inplace=not torch.is_grad_enabled())


def _as_tokens(features: Tensor, heads: int) -> Tensor:
    """[B,c,H,W] -> [B,heads,H*W,c/heads]."""
    batch, channels, height, width = features.shape
    return features.reshape(batch, heads, channels // heads, height * width).transpose(2, 3)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention over positions; all four tensors are [B,c,H,W], scale is (c/heads)**-0.5."""
    attended = functional.scaled_dot_product_attention(
        _as_tokens(query, heads), _as_tokens(key, heads), _as_tokens(value, heads)
    )
    return attended.transpose(2, 3).reshape(query.shape)


class AttentionBlock(nn.Module):
    """Single-head self-attention over positions, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B,c,H,W] -> [B,c,H,W]."""
        normed = self.norm(features)
        attended: Tensor = self.proj_out(_attend(self.q(normed), self.k(normed), self.v(normed), heads=1))
        return features + attended


class FusionAttention(nn.Module):
    """Adds to the common code what cross-attention reads from the HQ+ code (``fusion="attention"``).

    A sample below the threshold attends to its own common code. The published code decides that for a
    whole batch at once; here it is decided per sample, so that a sample does not depend on its neighbours.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(8, channels)
        self.norm1 = group_norm(channels)
        self.norm2 = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, common: Tensor, hq: Tensor, gate: Tensor) -> Tensor:
        """``common``, ``hq`` [B,d,h,h]; ``gate`` bool [B] -> [B,d,h,h]."""
        own = self.norm1(common)
        source = torch.where(gate[:, None, None, None], self.norm2(hq), own)
        read = _attend(self.q(own), self.k(source), self.v(source), self.heads)
        fused: Tensor = common + self.proj_out(read)
        return fused


class Downsample(nn.Module):
    """Halves the side: zero padding on the right and at the bottom, 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """[B,c,H,W] -> [B,c,H/2,W/2]."""
        halved: Tensor = self.conv(functional.pad(features, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Doubles the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """[B,c,H,W] -> [B,c,2H,2W]."""
        doubled: Tensor = self.conv(functional.interpolate(features, scale_factor=2.0, mode="nearest"))
        return doubled
