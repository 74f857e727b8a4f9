"""Exponential moving average of a network's weights; the averaged copy is the one that is used."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from iqpir.networks.restoration_network import RestorationNetwork


class Ema:
    """A copy of ``network`` whose trained weights follow it slowly.

    Parameters that require a gradient when this is built are averaged. Parameters in modules named
    ``copied`` (codebooks that have an average of their own) and all buffers are copied instead;
    other frozen parameters never change.

    Args:
        network: the network that is trained.
        decay: share of the old average kept at each update, in [0, 1).
        warmup: use ``min(decay, (1 + step) / (10 + step))``, so that short trainings forget the start.
        copied: names of direct submodules whose parameters are copied.
    """

    def __init__(
        self, network: RestorationNetwork, decay: float, *, warmup: bool = False, copied: Iterable[str] = ()
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self.module = copy.deepcopy(network).eval().requires_grad_(False)
        names = tuple(f"{name}." for name in copied)
        self._averaged: list[tuple[Tensor, Tensor]] = []
        self._copied = list(zip(self.module.buffers(), network.buffers(), strict=True))
        for (name, source), target in zip(network.named_parameters(), self.module.parameters(), strict=True):
            if source.requires_grad:
                self._averaged.append((target, source))
            elif name.startswith(names):
                self._copied.append((target, source))

    def decay_at(self, step: int) -> float:
        """Share of the old average kept after step ``step`` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights after step ``step`` (from 0)."""
        if self._averaged:
            targets, sources = (list(tensors) for tensors in zip(*self._averaged, strict=True))
            average = get_ema_multi_avg_fn(self.decay_at(step))
            average(targets, sources, 1)
        for target, source in self._copied:
            target.copy_(source)
