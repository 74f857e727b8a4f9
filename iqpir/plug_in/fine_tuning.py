"""Teach an attached quality prior what its dial means: a restoration loss, and a quality loss on the pixels.

The paper steers quality in the discrete space of a codebook, which cannot leave the textures it has learnt. A
host without a codebook has no such guard: here the quality loss acts on pixels, and a network can learn to
please a metric. So a metric outside the loss judges held-back pictures, always.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from iqpir.errors import PermanentError, UsageError
from iqpir.plug_in.attached_prior import AttachedPrior
from iqpir.plug_in.place import READ, evaluating
from iqpir.quality_prior import PiecewiseLinear, QualityPrior, load_rank_network
from iqpir.stages.dial import Order, own_quality, random_wish
from iqpir.training.precision import FP32, PrecisionConfig

Pairs = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""(degraded, good), or (degraded, good, quality of the good): [B,3,H,W] in [0,1], and [B] in [0,1]."""
Judge = Callable[[Tensor], Tensor]
"""[B,3,H,W] in [0,1] -> [B]."""


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """How the dial is taught."""

    steps: int = 200
    """Optimisation steps; the batches are gone through again where there are fewer."""
    learning_rate: float = 1e-3
    """Of Adam (0.9, 0.99)."""
    quality_weight: float = 0.1
    """Of the quality loss, beside 1 of the restoration loss; the paper's. More of it pleases the metric sooner."""
    target: Literal["match", "maximise"] = "match"
    """``match``: distance of the measured from the asked quality; ``maximise``: minus the measured (the paper's)."""
    dial_fraction: float = 0.5
    """Share of samples that are asked for a random quality instead of their own."""
    wish_weight: float = 1.0
    """How much the restoration loss counts in samples that are asked for a quality other than their own."""
    train: Literal["prior", "all"] = "prior"
    """``prior``: the host stays as it is; ``all``: what of the host requires a gradient is trained too."""
    dial: tuple[float, ...] = (0.05, 0.5, 0.95)
    """Qualities at which the held-back pictures are judged."""
    precision: PrecisionConfig = FP32
    """Number format of the host's forward pass; layout and compilation are the host's own affair."""
    seed: int = 2603
    """Of the wishes."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.learning_rate <= 0:
            raise UsageError(f"steps {self.steps} or learning_rate {self.learning_rate} is not positive.")
        if self.quality_weight < 0:
            raise UsageError(f"quality_weight {self.quality_weight} is negative.")
        for name in ("dial_fraction", "wish_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name} {getattr(self, name)} is outside [0, 1].")
        if not self.dial or not all(0.0 <= value <= 1.0 for value in self.dial):
            raise UsageError(f"dial {self.dial} needs values in [0, 1].")


@dataclass(frozen=True)
class DialPoint:
    """Means over the held-back pictures at one asked quality."""

    asked: float | None
    """None: the host without a wish."""
    quality: float
    """By the metric in the loss, in [0, 1]."""
    judged: float
    """By the metric outside the loss."""
    psnr: float
    """To the good pictures, in dB."""


@dataclass(frozen=True)
class FineTuneReport:
    """How the loss went, and what the dial does on pictures that were not trained on."""

    losses: list[float]
    """One a step."""
    before: DialPoint
    """The host as it was."""
    dial: list[DialPoint]
    """After the training."""


def rank_quality(device: torch.device | str = "cpu") -> QualityPrior:
    """The quality prior that needs no corpus: the trained rank network, its score 0 to 1 taken as 0.02 to 0.98.

    The room above and below is for scores outside 0 to 1, which untrained distortions have: their gradient leads back.
    """
    steady = PiecewiseLinear([0.0, 1.0], [0.02, 0.98])
    return QualityPrior({"rank": load_rank_network("rank")}, {"rank": steady}).to(device)


def fine_tune(
    prior: AttachedPrior,
    batches: Iterable[Pairs],
    config: FineTuneConfig,
    *,
    quality: Judge | None = None,
    judge: Judge | None = None,
) -> FineTuneReport:
    """Teach the dial on pairs of pictures.

    Args:
        prior: attached; its tables are trained in place.
        batches: two or more batches on the host's device. The first is held back, for the report.
        config: losses, steps, rate.
        quality: differentiable quality in [0,1] of pictures; ``rank_quality`` if None.
        judge: a metric outside the loss; ``rank_judge`` of ``iqpir.quality_prior`` if None.

    Raises:
        UsageError: fewer than two batches, or pictures of the wrong kind.
        PermanentError: the loss is not finite.
    """
    device = prior.tables[0].device
    measured = quality or rank_quality(device)
    judged = judge or load_rank_network("rank_judge", device)
    source = _endless(batches)
    held_back = _unpacked(next(source), measured)
    before = _judged(prior, held_back, measured, judged, None)
    losses = []
    with torch.enable_grad(), _trained(prior, config) as optimiser:
        generator = torch.Generator().manual_seed(config.seed)
        for _ in range(config.steps):
            lq, hq, own = _unpacked(next(source), measured)
            order = _order(own, config, generator)
            with prior.asking(order.quality):
                with config.precision.autocast(lq.device):
                    restored = prior.run(prior.host, lq)
                loss = _loss(restored.float(), hq, order, measured, config)
                optimiser.zero_grad(set_to_none=True)
                # Within the asking: what recomputes activations in this thread is asked alike.
                loss.backward()
            losses.append(float(loss.detach()))
            if not torch.isfinite(loss):
                raise PermanentError("The loss is not finite.", "Lower the learning rate, or look at the pictures.")
            optimiser.step()
    dial = [_judged(prior, held_back, measured, judged, asked) for asked in config.dial]
    return FineTuneReport(losses, before, dial)


def _loss(restored: Tensor, hq: Tensor, order: Order, measured: Judge, config: FineTuneConfig) -> Tensor:
    distance = (restored - hq).abs().mean(dim=(1, 2, 3))
    found = measured(restored.clamp(0, 1))
    judgement = (found - order.quality).abs() if config.target == "match" else -found
    return (distance * order.weights).mean() + config.quality_weight * judgement.mean()


def _order(own: Tensor, config: FineTuneConfig, generator: torch.Generator) -> Order:
    if config.dial_fraction == 0:
        return own_quality(own)
    draws = torch.rand(2, len(own), generator=generator).to(own.device)
    return random_wish(own, draws[0] < config.dial_fraction, draws[1], (0.0, 1.0), config.wish_weight)


def _unpacked(batch: Pairs, measured: Judge) -> tuple[Tensor, Tensor, Tensor]:
    lq, hq, *rest = batch
    if lq.ndim != 4 or len(lq) != len(hq) or not bool(((hq >= 0) & (hq <= 1)).all()):
        raise UsageError(
            f"A batch has pictures {tuple(lq.shape)} and {tuple(hq.shape)}.", "Give [B,3,H,W] in [0, 1], twice.", READ
        )
    with torch.no_grad():
        own = rest[0].float() if rest else measured(hq).float()
    return lq, hq, own.clamp(0, 1)


def _endless(batches: Iterable[Pairs]) -> Iterator[Pairs]:
    """The first batch, then the others for ever."""
    iterator = iter(batches)
    first, second = next(iterator, None), next(iterator, None)
    if first is None or second is None:
        raise UsageError(
            "There are fewer than two batches.", "The first is held back, the others are trained on.", READ
        )
    yield first
    yield second
    seen = [second]
    for batch in iterator:
        seen.append(batch)
        yield batch
    while True:
        yield from seen


@contextmanager
def _trained(prior: AttachedPrior, config: FineTuneConfig) -> Iterator[torch.optim.Optimizer]:
    """An optimiser; with ``train: prior`` the host is frozen and in evaluation mode until the block ends."""
    host = prior.host
    own = [parameter for parameter in host.parameters() if parameter.requires_grad]
    trained = list(prior.parameters()) if config.train == "prior" else list(chain(prior.parameters(), own))
    optimiser = torch.optim.Adam(trained, lr=config.learning_rate, betas=(0.9, 0.99))
    if config.train == "all":
        yield optimiser
        return
    with evaluating(host):
        _require_gradient(own, False)
        try:
            yield optimiser
        finally:
            _require_gradient(own, True)


def _require_gradient(parameters: list[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)


@torch.no_grad()
def _judged(
    prior: AttachedPrior, pairs: tuple[Tensor, Tensor, Tensor], measured: Judge, judge: Judge, asked: float | None
) -> DialPoint:
    lq, hq, _ = pairs
    with evaluating(prior.host):
        restored = prior.run(prior.host, lq) if asked is None else prior(lq, asked)
    pictures = restored.float().clamp(0, 1)
    error = (pictures - hq).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return DialPoint(
        asked=asked,
        quality=float(measured(pictures).mean()),
        judged=float(judge(pictures).mean()),
        psnr=float((-10 * torch.log10(error)).mean()),
    )
