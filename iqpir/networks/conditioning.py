"""How the wanted quality enters the network: one learned map per bin of each score.

Bin ``k`` of ``n`` holds [k/n, (k+1)/n); values outside [0, 1] fall into the nearest bin, so 1.0 is bin n-1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iqpir.errors import UsageError


def quality_bin(quality: Tensor, bins: int) -> Tensor:
    """Quality [B] in [0,1] -> int64 bin [B] in [0, bins)."""
    exact = quality if quality.dtype == torch.float64 else quality.float()
    # Clamped as a float: NaN stays NaN and fails loudly in the embedding instead of becoming bin 0.
    return (exact * bins).floor().clamp(0, bins - 1).long()


class QualityEmbedding(nn.Embedding):
    """A map [channels, side, side] for each bin of one score.

    Starts at zero: an untrained condition changes nothing. (The published N(0,1) swamps the latent.)
    """

    def __init__(self, bins: int, channels: int, side: int, deviation: float = 0.0) -> None:
        super().__init__(bins, channels * side * side)
        self.shape = (channels, side, side)
        nn.init.normal_(self.weight, std=deviation)

    def forward(self, quality: Tensor) -> Tensor:
        """[B] or [B,1] in [0,1] -> [B,channels,side,side].

        Raises:
            UsageError: several scores per sample.
        """
        scores = as_scores(quality, 1)
        return super().forward(quality_bin(scores[:, 0], self.num_embeddings)).view(-1, *self.shape)


class QualityEmbeddings(nn.ModuleList):
    """Sum of the maps of several scores."""

    def __init__(self, bins: Sequence[int], channels: int, side: int, deviation: float = 0.0) -> None:
        super().__init__(QualityEmbedding(count, channels, side, deviation) for count in bins)

    def forward(self, quality: Tensor) -> Tensor:
        """[B,n] in [0,1], or [B] for the same value in every score -> [B,channels,side,side].

        Raises:
            UsageError: neither one score per sample nor ``n``.
        """
        scores = as_scores(quality, len(self))
        maps: list[Tensor] = [embedding(scores[:, number]) for number, embedding in enumerate(self)]
        return torch.stack(maps).sum(dim=0)


def quality_embedding(
    bins: Sequence[int], channels: int, side: int, deviation: float = 0.0
) -> QualityEmbedding | QualityEmbeddings:
    """The embedding for ``bins``: its state-dict keys are ``weight``, or ``0.weight``, ``1.weight``, ..."""
    if len(bins) == 1:
        return QualityEmbedding(bins[0], channels, side, deviation)
    return QualityEmbeddings(bins, channels, side, deviation)


def as_scores(quality: Tensor, count: int) -> Tensor:
    """[B] or [B,n] -> [B,count]; one score per sample stands for all of them.

    Raises:
        UsageError: another number of scores than 1 or ``count``.
    """
    scores = quality[:, None] if quality.ndim == 1 else quality
    if scores.ndim != 2 or scores.shape[1] not in (1, count):
        raise UsageError(
            f"quality has shape {list(quality.shape)}; this network takes {count} score(s) per picture.",
            f"Pass a tensor of shape [B] or [B, {count}].",
        )
    return scores.expand(-1, count)


def consensus(quality: Tensor) -> Tensor:
    """[B] or [B,n] -> [B]: the mean of the scores, which the HQ+ threshold is compared with."""
    return quality if quality.ndim == 1 else quality.mean(dim=1)
