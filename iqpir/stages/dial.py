"""Teaching the dial: what each sample is asked for in a step of stage 2, and what the right answer is.

A corpus holds each picture at one quality, so the condition is learnt as a fact about the sample, and
qualities that the corpus lacks are never learnt. The remedy, ours: some samples are asked for a random
quality, which the quality loss teaches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from iqpir.networks.conditioning import consensus
from iqpir.quality_prior import QualityPrior
from iqpir.training.distributed import Distributed

DIAL, JITTER, CROP = 2, 3, 4
"""Purpose numbers of random draws: wishes, how judged pictures are moved, and which part of them is judged."""


class Order(NamedTuple):
    """What the network is asked for, and how its answer is judged."""

    quality: Tensor
    """[B] or [B,n]: the condition."""
    weights: Tensor
    """[B]: how much the sample's own codes count."""
    wished: Tensor
    """bool [B]: the condition is not the sample's own quality."""


def own_quality(quality: Tensor) -> Order:
    """Each sample at its own ``quality`` ([B] or [B,n]): the paper's way."""
    ones = torch.ones(len(quality), device=quality.device)
    return Order(quality, ones, torch.zeros_like(ones, dtype=torch.bool))


def random_wish(quality: Tensor, chosen: Tensor, places: Tensor, between: tuple[float, float], weight: float) -> Order:
    """Samples ``chosen`` are asked for a random quality; their own codes count with ``weight``.

    Args:
        quality: of the samples, [B] or [B,n].
        chosen: bool [B].
        places: in [0,1), where in ``between`` the wish lies: [B] for all scores, or [B,n].
        between: range of the wish.
        weight: of codes that have another quality than the wish.
    """
    asked = between[0] + (between[1] - between[0]) * places
    if quality.ndim == 2:
        wanted = torch.where(chosen[:, None], asked.view(len(asked), -1), quality)
    else:
        wanted = torch.where(chosen, asked, quality)
    return Order(wanted, torch.where(chosen, weight, 1.0), chosen)


def own_slots(count: int, ranks: Distributed) -> slice:
    """The slots of this rank, which has ``count`` samples, in the global batch.

    Draws are made for the global batch: the same sample gets the same at any number of ranks.
    """
    return slice(ranks.rank * count, (ranks.rank + 1) * count)


def draw_wishes(
    quality: Tensor,
    fraction: float,
    between: tuple[float, float],
    weight: float,
    ranks: Distributed,
    generator: torch.Generator,
) -> Order:
    """``random_wish`` for a random share of the samples, ``fraction``; each score has a wish of its own."""
    scores = 1 if quality.ndim == 1 else quality.shape[1]
    draws = torch.rand(1 + scores, len(quality) * ranks.world_size, generator=generator)
    chance, *wishes = draws[:, own_slots(len(quality), ranks)].to(quality.device)
    places = torch.stack(wishes, dim=-1).view(quality.shape)
    return random_wish(quality, chance < fraction, places, between, weight)


def judged(
    prior: nn.Module, pictures: Tensor, quality: Tensor, prior_scores: Sequence[int] | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What was measured, and what was asked for: both [B], or both a column for each metric of the prior.

    Args:
        prior: [B,3,H,W] in [0,1] -> [B].
        pictures: restored ones, in [0,1].
        quality: that they were asked for, [B] or [B,n].
        prior_scores: which of the n scores each metric of the prior, a ``QualityPrior``, is to match; None: the mean of
            all is to match their mean.
        generator: of the place that a bounded prior judges, one for all pictures of a step.
    """
    if not isinstance(prior, QualityPrior):
        return prior(pictures), consensus(quality)
    if prior_scores is None:
        return prior(pictures, generator), consensus(quality)
    return prior.scores(pictures, generator), quality[:, list(prior_scores)]


def draw_jitter(count: int, reach: int, generator: torch.Generator) -> Tensor:
    """int64 [count,3] on the CPU: rows and columns in [0, 2 * reach] to shift by, and whether to mirror."""
    corners = torch.randint(2 * reach + 1, (count, 2), generator=generator)
    return torch.cat([corners, torch.randint(2, (count, 1), generator=generator)], dim=1)


def jittered(pictures: Tensor, reach: int, moves: Tensor) -> Tensor:
    """Each picture [B,3,H,W] shifted by up to ``reach`` pixels each way (edges reflected), and mirrored or not.

    Nothing that a person calls quality changes; a pattern that only pleases on one grid loses its place.

    Args:
        pictures: any range; H and W above ``reach``.
        reach: in pixels, at least 1.
        moves: [B,3] from ``draw_jitter`` of the same reach.
    """
    height, width = pictures.shape[-2:]
    padded = functional.pad(pictures, (reach, reach, reach, reach), mode="reflect")
    moved = [
        picture[:, top : top + height, left : left + width].flip(-1)
        if mirror
        else picture[:, top : top + height, left : left + width]
        for picture, (top, left, mirror) in zip(padded, moves.tolist(), strict=True)
    ]
    return torch.stack(moved)
