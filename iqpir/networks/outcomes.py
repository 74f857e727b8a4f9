"""What the restoration network returns besides pictures: quantised latents and predicted codes."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from iqpir.networks.code_transformer import deinterleave


class Quantised(NamedTuple):
    """Stage 1: a latent in the discrete space of the codebooks."""

    latent: Tensor
    """What the generator decodes [B,d,h,h]: the fused codes, with a gradient to z."""
    codes: Tensor
    """int64 [B,C,h,h]; C = 1 (common) or 2 (common, HQ+). HQ+ codes are given for every sample."""
    common_loss: Tensor
    """Loss of the common codebook per sample [B]."""
    hq_loss: Tensor | None
    """Loss of the HQ+ codebook per sample [B], 0 for samples not above the threshold; None without it."""
    gate: Tensor
    """bool [B]: samples whose quality is above the threshold (all False without an HQ+ codebook)."""

    @property
    def loss(self) -> Tensor:
        """Mean over the batch of both losses, 0-d. The HQ+ part is divided by B, not by the gated samples."""
        common = self.common_loss.mean()
        return common if self.hq_loss is None else common + self.hq_loss.mean()


class Reconstruction(NamedTuple):
    """Stage 1: a picture through the autoencoder."""

    pictures: Tensor
    """[B,3,R,R], about [-1,1], not clamped."""
    raw_latent: Tensor
    """Encoder output z [B,d,h,h]."""
    quantised: Quantised


class Prediction(NamedTuple):
    """Stage 2: the predicted codes of a picture."""

    logits: Tensor
    """As the head gives them: [B,N,K], or [B,N,2K] interleaved (unit 2k: HQ+ code k; 2k+1: common code k)."""
    latent: Tensor
    """Latent that the Transformer read [B,d,h,h]: z plus the quality map (``conditioning="add"``)."""
    raw_latent: Tensor
    """Encoder output z [B,d,h,h]."""
    taps: Mapping[int, Tensor]
    """Encoder features by side, for the fidelity modules; empty when not asked for."""
    books: int
    """1 or 2 codebooks."""

    @property
    def common(self) -> Tensor:
        """Logits of the common codebook [B,N,K]."""
        return self.logits if self.books == 1 else deinterleave(self.logits)[0]

    @property
    def hq(self) -> Tensor:
        """Logits of the HQ+ codebook [B,N,K]; only with two codebooks."""
        if self.books == 1:
            raise ValueError("a network with a single codebook predicts no HQ+ codes")
        return deinterleave(self.logits)[1]

    @property
    def codes(self) -> Tensor:
        """Most likely codes: int64 [B,C,h,h]."""
        side = self.latent.shape[-1]
        books = [self.common] if self.books == 1 else [self.common, self.hq]
        return torch.stack([logits.argmax(dim=-1).view(-1, side, side) for logits in books], dim=1)
