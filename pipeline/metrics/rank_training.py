"""Train the rank network on ordered distortions of natural pictures (RankIQA, arXiv 1707.08347).

A chain is one crop at growing strengths of one distortion: its order is known without asking anybody.
Scores of different crops are tied together by structural similarity to their own undistorted crop
(Wang et al., TIP 2004), again without any opinion.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from iqpir.quality_prior import RANK_FACTS, RankNetwork
from pipeline.metrics.distortions import Picture, distort

logger = logging.getLogger(__name__)

LEVELS = 5
"""Pictures in a chain, the undistorted one included."""
_SIZES = ((32, 0.35), (48, 0.15), (64, 0.3), (96, 0.1), (128, 0.1))
_PIXELS = 60 * 64 * 64
"""Pixels of one optimisation step."""
_KIND_SHARES = {
    "blur": 0.15,
    "noise": 0.15,
    "jpeg": 0.15,
    "downsample": 0.15,
    "mixture": 0.2,
    "median": 0.06,
    "oversharpen": 0.07,
    "grid": 0.07,
}


@dataclass(frozen=True)
class Chains:
    """Crops of a step: ``pictures`` [N*L,3,S,S] in [0,1], chain by chain, mild to strong; strengths [N,L]."""

    pictures: Tensor
    strengths: Tensor


def sample_chains(pictures: Sequence[Picture], rng: np.random.Generator) -> Chains:
    """Draw the chains of one step; the size is drawn once, the number follows from the pixel budget."""
    sizes, shares = zip(*_SIZES, strict=True)
    size = int(rng.choice(sizes, p=shares))
    count = max(4, _PIXELS // (size * size * LEVELS))
    chains, strengths = [], []
    for _ in range(count):
        levels = np.concatenate([[-0.2], _increasing(rng)])
        chains.append(_chain(pictures[int(rng.integers(len(pictures)))], size, levels, rng))
        strengths.append(levels)
    stacked = np.stack(chains).reshape(-1, size, size, 3)
    tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().float() / 255.0
    return Chains(tensor, torch.from_numpy(np.stack(strengths)).float())


def _increasing(rng: np.random.Generator) -> NDArray[np.float64]:
    """LEVELS - 1 strengths in [0, 1], increasing, at least 0.06 apart."""
    gap = 0.06
    free = np.sort(rng.uniform(0.0, 1.0 - gap * (LEVELS - 2), LEVELS - 1))
    return np.asarray(free + gap * np.arange(LEVELS - 1))


def _chain(picture: Picture, size: int, levels: NDArray[np.float64], rng: np.random.Generator) -> Picture:
    """One crop at each of ``levels``: [L,S,S,3].

    Half of the crops are distorted together with a margin and cut out afterwards, so that the grid of
    JPEG blocks lies anywhere; the other half is distorted alone, as small pictures of a corpus are.
    """
    margin = int(rng.integers(1, 17)) if rng.random() < 0.5 else 0
    crop = _textured_crop(picture, size + 2 * margin, rng)
    names = list(_KIND_SHARES)
    kind = names[int(rng.choice(len(names), p=list(_KIND_SHARES.values())))]
    seed = int(rng.integers(2**31))
    inner = slice(margin, margin + size)
    return np.stack([(crop if level < 0 else distort(crop, kind, level, seed))[inner, inner] for level in levels])


def _textured_crop(picture: Picture, side: int, rng: np.random.Generator) -> Picture:
    """A random square, at a random reduction, turned at random; the most textured of up to four draws."""
    best, most = picture[:side, :side], -1.0
    for _ in range(4):
        reduction = min(float(rng.choice([1.0, 1.0, 1.33, 2.0])), min(picture.shape[:2]) / side)
        outer = int(side * reduction)
        top, left = (int(rng.integers(extent - outer + 1)) for extent in picture.shape[:2])
        window = picture[top : top + outer, left : left + outer]
        if outer != side:
            window = np.asarray(cv2.resize(window, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
        texture = float(window.std())
        if texture > most:
            best, most = window, texture
        if texture > 12.0:
            break
    turned = np.rot90(best, int(rng.integers(4)))
    return np.ascontiguousarray(turned[:, ::-1] if rng.random() < 0.5 else turned)


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean SSIM of luma with 7x7 boxes: two [B,3,H,W] in [0,1] -> [B]."""
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    a, b = (first * luma).sum(1, keepdim=True), (second * luma).sum(1, keepdim=True)
    stack = functional.avg_pool2d(torch.cat([a, b, a * a, b * b, a * b], 1), 7, stride=2)
    mean_a, mean_b, aa, bb, ab = stack.unbind(1)
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (numerator / denominator).mean((1, 2))


def rank_loss(scores: Tensor, chains: Chains, generator: torch.Generator) -> Tensor:
    """Hinge over all pairs of a chain, margin growing with the strength between them, and over mixed pairs.

    Args:
        scores: [N*L]; differentiable.
        chains: what was scored.
        generator: pairs crops of different chains.
    """
    count, levels = chains.strengths.shape
    table = scores.view(count, levels)
    upper, lower = torch.triu_indices(levels, levels, 1)
    margins = 1.0 * (chains.strengths[:, lower] - chains.strengths[:, upper])
    views = chains.pictures.view(count, levels, -1)
    visible = (views[:, upper] - views[:, lower]).abs().mean(-1) > 0.4 / 255.0
    hinge = functional.relu(margins - (table[:, upper] - table[:, lower]))
    within = (hinge * visible).sum() / visible.sum().clamp(min=1)

    clean = chains.pictures.view(count, levels, *chains.pictures.shape[1:])[:, :1]
    reference = clean.expand(-1, levels, -1, -1, -1).reshape(chains.pictures.shape)
    fidelity = structural_similarity(chains.pictures, reference)
    partner = torch.randperm(len(scores), generator=generator)
    gap = fidelity - fidelity[partner]
    clear = gap > 0.15
    across = functional.relu(gap - (scores - scores[partner])) * clear
    return within + 0.5 * across.sum() / clear.sum().clamp(min=1)


def train_rank_network(
    pictures: Sequence[Picture],
    *,
    widths: Sequence[int],
    steps: int,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> RankNetwork:
    """Train a rank network; the same arguments give the same weights on the same machine.

    Args:
        pictures: uint8 RGB, sides of at least 192.
        widths: channels of the network.
        steps: optimisation steps of about 60 crops of 64x64.
        seed: of weights, crops and distortions.
        progress: called with the step and the mean loss since the last call, every 50 steps.

    Returns:
        Averaged (EMA) weights, scores scaled to about 0..1 (see ``RankNetwork.forward``).
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RankNetwork(widths)
    average = {key: value.clone() for key, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=1.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=steps, pct_start=0.1)
    total = 0.0
    for step in range(1, steps + 1):
        chains = sample_chains(pictures, rng)
        scores = network(chains.pictures.contiguous(memory_format=torch.channels_last))
        loss = rank_loss(scores, chains, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        decay = min(0.995, step / (step + 10.0))
        for key, value in network.state_dict().items():
            average[key].lerp_(value, 1.0 - decay)
        total += float(loss.detach())
        if progress is not None and step % 50 == 0:
            progress(step, total / 50)
            total = 0.0
    network.load_state_dict(average)
    return _scaled(network.eval().requires_grad_(False), pictures, rng)


def _scaled(network: RankNetwork, pictures: Sequence[Picture], rng: np.random.Generator) -> RankNetwork:
    """Set the affine end so that the median undistorted crop scores 1 and the median ruined one 0."""
    best, worst = [], []
    for _ in range(20):
        chains = sample_chains(pictures, rng)
        table = network(chains.pictures).view(chains.strengths.shape)
        best.append(table[:, 0])
        worst.append(table[:, -1][chains.strengths[:, -1] > 0.9])
    high, low = torch.cat(best).median(), torch.cat(worst).median()
    network.offset.copy_(low)
    network.scale.copy_(1.0 / (high - low).clamp(min=1e-6))
    return network


def save_rank_network(network: RankNetwork, path: Path, facts: dict[str, str]) -> None:
    """Write weights and facts (data, licence, seed, steps) as safetensors; one commit, no pickle."""
    state = {key: value.contiguous().clone() for key, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # One key: safetensors writes several in random order, and equal fits shall give equal files.
    metadata = {RANK_FACTS: json.dumps({**facts, "widths": list(network.widths)}, sort_keys=True)}
    save_file(state, str(temporary), metadata=metadata)
    temporary.replace(path)


def log_progress(steps: int) -> Callable[[int, float], None]:
    """A ``progress`` for ``train_rank_network`` that logs loss and remaining time."""
    start = time.monotonic()

    def report(step: int, loss: float) -> None:
        seconds = time.monotonic() - start
        logger.info("step %d/%d loss %.4f, %.0f s left", step, steps, loss, seconds / step * (steps - step))

    return report
