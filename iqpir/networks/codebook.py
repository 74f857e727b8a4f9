"""Upkeep of a codebook during stage 1: moving averages, k-means start, revival of dead codes, statistics.

All of it gives the same result on every rank. Nothing here is part of a network's state dict.
Source of the moving averages: VQ-VAE (arXiv 1711.00937, appendix A.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn import functional

from iqpir.errors import UsageError
from iqpir.networks.vector_quantizer import (
    PUBLISHED,
    Assignment,
    QuantiserConfig,
    VectorQuantizer,
    nearest,
    rows_of,
)

__all__ = [
    "PUBLISHED",
    "Assignment",
    "CodebookStatistics",
    "EmaCodebook",
    "EmaConfig",
    "QuantiserConfig",
    "VectorQuantizer",
    "count_codes",
    "gather_rows",
    "k_means",
    "sum_over_ranks",
]


def count_codes(codes: Tensor, size: int) -> Tensor:
    """How often each of ``size`` codes occurs in ``codes``, over all ranks: float32 [K]."""
    counts = torch.bincount(codes.flatten(), minlength=size).float()
    return sum_over_ranks(counts)


class CodebookStatistics(NamedTuple):
    """Health of a codebook, from how often each code was used. All are 0-d tensors."""

    usage: Tensor
    """Share of codes used at least once, in [0, 1]."""
    perplexity: Tensor
    """exp(entropy) of the usage: K when all are used alike, 1 when one code is all."""
    dead: Tensor
    """Number of codes never used."""

    @classmethod
    def of(cls, counts: Tensor) -> "CodebookStatistics":
        """Statistics of a count vector [K]; perplexity is 1 when nothing was counted."""
        used = counts > 0
        shares = counts.float() / counts.sum().clamp_min(1)
        entropy = -torch.special.xlogy(shares, shares).sum()
        return cls(used.float().mean(), entropy.exp(), (~used).sum())


def sum_over_ranks(values: Tensor) -> Tensor:
    """``values`` summed over all processes (in place); as they are without a process group."""
    if _distributed():
        distributed.all_reduce(values)
    return values


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [M_r,d] of all ranks, in rank order; M_r may differ and be 0."""
    if not _distributed():
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = functional.pad(rows, (0, 0, 0, max(sizes) - rows.shape[0]))
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How moving averages keep a codebook on its latents."""

    decay: float = 0.99
    """Share of the old average that one update keeps, in (0, 1)."""
    epsilon: float = 1e-5
    """Average count below which a code stays where it is instead of being divided by almost nothing."""
    kmeans_iterations: int = 10
    """Iterations of k-means that place the codes before the first update; 0 starts from the present codes."""
    kmeans_points: int = 32768
    """Latent vectors, over all ranks, that k-means looks at."""
    revive_every: int = 100
    """Updates between two searches for dead codes; 0 never revives."""
    revive_below: float = 0.1
    """A code is dead when its average count is below this share of the mean count."""

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise UsageError(f"decay {self.decay} is outside (0, 1).", "Choose 0.99 or nearby.")
        if not 0.0 <= self.revive_below < 1.0:
            raise UsageError(f"revive_below {self.revive_below} is outside [0, 1).")
        if self.epsilon <= 0 or min(self.kmeans_iterations, self.revive_every, self.kmeans_points - 1) < 0:
            raise UsageError("epsilon, kmeans_points must be positive; kmeans_iterations, revive_every not negative.")


class EmaCodebook:
    """Teaches the codes of one ``VectorQuantizer`` by moving averages of the latents assigned to them.

    Belongs to the stage, not to the network. Takes the codes away from the optimiser (``requires_grad`` off);
    use it with ``QuantiserConfig(codebook_weight=0)``. Make it once the network is on its device.

    Args:
        quantizer: the codebook to keep.
        config: rates and thresholds.
        seed: all random choices are functions of it, the update number and, for local samples, the rank.
    """

    def __init__(self, quantizer: VectorQuantizer, config: EmaConfig, seed: int) -> None:
        self.quantizer, self.config, self.seed = quantizer, config, seed
        weight = quantizer.embedding.weight.requires_grad_(False)
        self.counts = torch.ones(quantizer.size, device=weight.device)
        self.sums = weight.detach().float().clone()
        self.updates = 0
        self.started = config.kmeans_iterations == 0

    @torch.no_grad()
    def start(self, latent: Tensor, gate: Tensor | None = None) -> bool:
        """Place all codes by k-means on latents of all ranks; arguments as for ``update``.

        Returns:
            False when no rank had a vector to offer (nothing changed; try the next batch).
        """
        rows = _gated_rows(latent, gate)
        ranks = distributed.get_world_size() if _distributed() else 1
        pool = gather_rows(self._sample(rows, max(1, self.config.kmeans_points // ranks)))
        if len(pool) == 0:
            return False
        centroids, counts = k_means(pool, self.quantizer.size, self.config.kmeans_iterations, self._generator(rank=-1))
        placed = torch.cat([centroids, counts[:, None]], dim=1)
        if _distributed():
            # Ranks may run different kernels: one of them decides.
            distributed.broadcast(placed, src=0)
        self.counts = placed[:, -1] / placed[:, -1].mean()
        self.sums = placed[:, :-1] * self.counts[:, None]
        self._write(placed[:, :-1])
        self.started = True
        return True

    @torch.no_grad()
    def update(self, latent: Tensor, codes: Tensor, gate: Tensor | None = None) -> None:
        """One moving-average update, then, when it is due, revival of dead codes.

        Args:
            latent: what was quantised, this rank's part [B,d,h,h]; call after the backward pass.
            codes: int64 [B,h,h], the codes it was given.
            gate: bool [B], samples that count (HQ+ codebook); None: all.
        """
        if not self.started:
            raise ValueError("start() places the codes before the first update")
        rows = rows_of(latent.detach().float())
        weights = torch.ones(len(latent), device=rows.device) if gate is None else gate.float()
        weights = weights.repeat_interleave(codes[0].numel())[:, None]
        found = torch.zeros(self.quantizer.size, rows.shape[1] + 1, device=rows.device)
        found.index_add_(0, codes.flatten(), torch.cat([rows, weights.new_ones(len(rows), 1)], dim=1) * weights)
        sum_over_ranks(found)
        # A step without any counted sample teaches nothing; decided without waiting for the device.
        share = torch.where(found[:, -1].sum() > 0, 1.0 - self.config.decay, 0.0)
        self.counts = torch.lerp(self.counts, found[:, -1], share)
        self.sums = torch.lerp(self.sums, found[:, :-1], share)
        kept = self.counts[:, None] < self.config.epsilon
        means = self.sums / self.counts[:, None].clamp_min(self.config.epsilon)
        self._write(torch.where(kept, self.quantizer.embedding.weight.float(), means))
        self.updates += 1
        if self.config.revive_every and self.updates % self.config.revive_every == 0:
            self._revive(_gated_rows(latent, gate))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that ``load_state_dict`` needs to go on exactly here; the codes are the network's."""
        return {
            "counts": self.counts.clone(),
            "sums": self.sums.clone(),
            "updates": torch.tensor(self.updates),
            "started": torch.tensor(self.started),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            UsageError: the state is of a codebook of another size, or of something else.
        """
        own = self.state_dict()
        if {key: value.shape for key, value in state.items()} != {key: own[key].shape for key in own}:
            raise UsageError(
                f"This is not the state of a codebook with {self.quantizer.size} codes.",
                "Resume with the network configuration that the checkpoint was made with.",
            )
        self.counts = state["counts"].to(self.counts, copy=True)
        self.sums = state["sums"].to(self.sums, copy=True)
        self.updates, self.started = int(state["updates"]), bool(state["started"])

    def _revive(self, rows: Tensor) -> None:
        """Move dead codes onto latents of this batch; the same codes and vectors on every rank."""
        mean = self.counts.mean()
        dead = torch.nonzero(self.counts < self.config.revive_below * mean)[:, 0]
        if len(dead) == 0:
            return
        pool = gather_rows(self._sample(rows, len(dead)))
        if len(pool) == 0:
            return
        order = torch.randperm(len(pool), generator=self._generator(rank=-1)).to(pool.device)
        # Fewer vectors than dead codes: the others wait for the next search.
        dead = dead[: len(pool)]
        vectors = pool[order[: len(dead)]]
        self.counts[dead] = mean
        self.sums[dead] = vectors * mean
        self.quantizer.embedding.weight[dead] = vectors.to(self.quantizer.embedding.weight)

    def _write(self, codes: Tensor) -> None:
        self.quantizer.embedding.weight.copy_(codes)

    def _sample(self, rows: Tensor, count: int) -> Tensor:
        """At most ``count`` different ones of this rank's ``rows`` [M,d]."""
        rank = distributed.get_rank() if _distributed() else 0
        order = torch.randperm(len(rows), generator=self._generator(rank))[:count]
        return rows[order.to(rows.device)]

    def _generator(self, rank: int) -> torch.Generator:
        """Random numbers of this update; ``rank`` -1: those that all ranks share."""
        words = np.random.SeedSequence([self.seed, self.updates, rank + 1]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]))


def _gated_rows(latent: Tensor, gate: Tensor | None) -> Tensor:
    return rows_of((latent if gate is None else latent[gate]).detach().float())


def k_means(points: Tensor, count: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from ``count`` random points; an empty cluster moves to a badly served point.

    With fewer points than clusters nothing is iterated: each is a centroid, and the rest are points with
    noise of 1 % of their deviation.

    Args:
        points: [M,d] float32, M > 0.
        count: clusters K.
        iterations: rounds.
        generator: CPU generator of the start.

    Returns:
        Centroids [K,d] and points per centroid [K] (float32).
    """
    order = torch.randperm(len(points), generator=generator)
    chosen = order.repeat(-(-count // len(points)))[:count].to(points.device)
    noise = torch.randn(count, points.shape[1], generator=generator).to(points)
    noise[: len(points)] = 0.0
    centroids = points[chosen] + 0.01 * points.std(dim=0, correction=0) * noise
    for _ in range(iterations if len(points) > count else 0):
        codes = nearest(points, centroids)
        counts = torch.bincount(codes, minlength=count)
        sums = torch.zeros_like(centroids).index_add_(0, codes, points)
        empty = torch.nonzero(counts == 0)[:, 0]
        worst = (points - centroids[codes]).square().sum(dim=1).argsort(descending=True)[: len(empty)]
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centroids)
        centroids[empty[: len(worst)]] = points[worst]
    return centroids, torch.bincount(nearest(points, centroids), minlength=count).float()
