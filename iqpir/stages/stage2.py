"""Stage 2: predict the codes of the good picture from the degraded one, at a wanted quality.

Frozen: codebooks and generator. Trained: encoder, quality condition, Transformer, head.
Source: IQPIR (arXiv 2603.29773): L = L_feat + 0.5 L_index + 0.1 L_quality.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from iqpir.errors import UsageError
from iqpir.losses import anchor_loss, quality_loss, to_unit_range
from iqpir.networks.fidelity import adaptive_instance_norm, keep_tones
from iqpir.networks.outcomes import Prediction
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.networks.vector_quantizer import straight_through
from iqpir.stages.batch import Batch
from iqpir.stages.code_targets import (
    CodeLossConfig,
    accuracies,
    code_losses,
    require_same_codebooks,
    target_codes,
)
from iqpir.stages.dial import (
    CROP,
    DIAL,
    JITTER,
    Order,
    draw_jitter,
    draw_wishes,
    jittered,
    judged,
    own_quality,
    own_slots,
)
from iqpir.stages.telemetry import code_health, count_codes, freeze_except, montage
from iqpir.training.distributed import SINGLE, Distributed
from iqpir.training.ema import Ema
from iqpir.training.optimiser import OptimiserConfig, apply_gradients, build_optimiser, hasten
from iqpir.training.precision import FP32, PrecisionConfig, prepare
from iqpir.training.state import TrainState

TRAINED = ("encoder", "position_emb", "feat_emb", "score_embed", "ft_layers", "idx_pred_layer")


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """Losses and schedule of stage 2; the defaults are the paper's."""

    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(
            learning_rate=1e-4, schedule="multistep", milestones=(400_000, 450_000), gamma=0.5
        )
    )
    """Of everything that is trained."""
    codes: CodeLossConfig = field(default_factory=CodeLossConfig)
    """Weights of the losses against the right codes."""
    quality_weight: float = 0.1
    """Weight of the quality loss of the restored picture; 0 never runs the generator."""
    quality_grad: Literal["straight_through", "logits", "continuous"] = "straight_through"
    """Path of the quality gradient: copied to the encoder (paper); through expected codes, so that the
    Transformer learns too (ours); or without quantisation, which over-optimises (for comparison only)."""
    quality_temperature: float = 1.0
    """Temperature of the expected codes of ``logits``."""
    quality_target: Literal["maximise", "match"] = "maximise"
    """Push quality up (paper), or towards the quality that the network was asked for (ours)."""
    quality_start: int = 0
    """Step from which on the quality loss counts."""
    quality_every: int = 1
    """The quality loss counts at every so many steps; other steps run no generator."""
    quality_samples: int = 0
    """Samples of each rank's batch that the quality loss is computed for; 0 means all."""
    quality_anchor: float = 0.0
    """Weight of the distance of the judged picture to the good one, L1 and 1 - SSIM (ours): quality is only
    sought near what the picture shows."""
    quality_restored: bool = False
    """Judge the picture as inference makes it, with the statistics of the input's latent and the tones of the
    input (ours); else as it is decoded from codes alone."""
    quality_jitter: int = 0
    """Judge the picture shifted by up to so many pixels and mirrored at random (ours): specks that please the
    prior at one position only gain nothing."""
    dial_fraction: float = 0.0
    """Share of samples that, where the quality loss counts, are asked for a random quality instead of
    their own (ours). Needs ``match``."""
    dial_range: tuple[float, float] = (0.0, 1.0)
    """Range that the random quality is drawn from."""
    dial_code_weight: float = 0.0
    """Weight of the losses against codes for samples asked for a random quality: their codes have another."""
    dial_rate: float = 1.0
    """Learning rate of the quality maps over that of everything else (ours): a sample teaches only the map of
    its bin, and maps start at zero, so in short trainings they lag behind."""
    ema_decay: float = 0.995
    """Decay of the averaged weights."""
    ema_warmup: bool = False
    """Average over fewer steps at first; for short trainings."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.dial_fraction <= 1.0:
            raise UsageError(f"dial_fraction {self.dial_fraction} is outside [0, 1].")
        if self.dial_fraction > 0 and (self.quality_target != "match" or self.quality_weight == 0):
            raise UsageError(
                "dial_fraction asks for random qualities, which nothing would teach.",
                "Set quality_target to match and quality_weight above 0, or dial_fraction to 0.",
            )
        if not 0.0 <= self.dial_range[0] <= self.dial_range[1] <= 1.0:
            raise UsageError(f"dial_range {self.dial_range} is no range inside [0, 1].")
        if self.quality_every < 1 or min(self.quality_temperature, self.dial_rate) <= 0:
            raise UsageError("quality_every must be at least 1, quality_temperature and dial_rate positive.")
        if min(self.quality_start, self.quality_samples, self.quality_anchor, self.quality_jitter) < 0:
            raise UsageError("quality_start, _samples, _anchor and _jitter must not be negative.")
        if self.quality_anchor > 0 and self.quality_weight == 0:
            raise UsageError("quality_anchor without quality_weight anchors nothing.", "Set both, or neither.")

    def judges_at(self, step: int) -> bool:
        """Whether the quality loss counts in step ``step``, from 0."""
        late = step >= self.quality_start
        return self.quality_weight > 0 and late and (step - self.quality_start) % self.quality_every == 0


class PredictPass(nn.Module):
    """The forward that is wrapped for many ranks: everything trained, nothing else."""

    def __init__(self, network: RestorationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> (logits, conditioned latent, encoder's latent); see ``RestorationNetwork.predict``."""
        predicted = self.network.predict(pictures, quality)
        return predicted.logits, predicted.latent, predicted.raw_latent


class Stage2:
    """Stage 2.

    Args:
        config: losses and schedule.
        quality_prior: [B,3,H,W] in [0,1] -> [B] in [0,1], differentiable, frozen.
        prior_scores: for a condition of several scores: which of them each metric of the prior, a ``QualityPrior``,
            is to match. None: the prior's mean is to match their mean.
        teacher: stage-1 network whose encoder makes codes for batches that have none.
        precision: number format and layout.
        distributed: the ranks.

    Raises:
        UsageError: quality_weight is positive and there is no prior.
    """

    name = "stage2"

    def __init__(
        self,
        config: Stage2Config,
        *,
        quality_prior: nn.Module | None = None,
        prior_scores: Sequence[int] | None = None,
        teacher: RestorationNetwork | None = None,
        precision: PrecisionConfig = FP32,
        distributed: Distributed = SINGLE,
    ) -> None:
        self.prior_scores = prior_scores
        if config.quality_weight > 0 and quality_prior is None:
            raise UsageError(
                f"quality_weight is {config.quality_weight}, but no quality prior was given.",
                "Name differentiable metrics, or set quality_weight to 0.",
            )
        self.config = config
        self.precision = precision
        self.distributed = distributed
        self.quality_prior = None if quality_prior is None else quality_prior.eval().requires_grad_(False)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    def initial_state(self, network: RestorationNetwork, *, seed: int) -> TrainState:
        """A fresh state around ``network``, whose autoencoder is already that of stage 1.

        Raises:
            UsageError: the teacher's codebooks are not the network's.
        """
        self.distributed.synchronise(network)
        if self.teacher is not None:
            require_same_codebooks(self.teacher, network)
        freeze_except(network, TRAINED)
        ema = Ema(network, self.config.ema_decay, warmup=self.config.ema_warmup)
        optimiser = build_optimiser(self.config.optimiser, network.parameters())
        if network.score_embed is not None:
            hasten(optimiser, network.score_embed.parameters(), self.config.dial_rate)
        passes = {"predict": self.distributed.wrap(PredictPass(prepare(network, self.precision)))}
        return TrainState(network=network, ema=ema, optimisers={"network": optimiser}, seed=seed, passes=passes)

    def step(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """One optimisation step on ``batch``, which has degraded pictures.

        Raises:
            UsageError: no degraded pictures, or neither codes nor a teacher.
        """
        prior = self.quality_prior if self.config.judges_at(state.step) else None
        order = self._order(state, batch, judged=prior is not None)
        codes = target_codes(batch, state.network, self.teacher)
        with self.precision.autocast(batch.hq.device):
            logits, latent, raw = state.passes["predict"](batch.degraded, order.quality)
        predicted = Prediction(logits.float(), latent.float(), raw.float(), {}, state.network.books)
        losses = code_losses(state.network, predicted, codes, batch.quality, order.weights, self.config.codes)
        if prior is not None:
            sought, measured = self._quality_losses(prior, state, predicted, order, batch)
            losses |= sought
        total = torch.stack(list(losses.values())).sum()
        torch.autograd.backward(total)
        apply_gradients(self.config.optimiser, state.optimisers["network"], state.step)
        state.ema.update(state.step)
        values = {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}
        if prior is not None:
            values["restored_quality"] = measured.detach()
        found = predicted.codes
        values |= accuracies(found, codes)
        count_codes(state, found)
        return values

    def health(self, state: TrainState) -> dict[str, float]:
        """Usage, perplexity and dead codes among the predictions of each codebook; the learning rate."""
        rate = self.config.optimiser.learning_rate_at(max(0, state.step - 1))
        return {**code_health(state, self.distributed), "learning_rate": rate}

    @torch.no_grad()
    def preview(self, state: TrainState, batch: Batch) -> Tensor:
        """[H,W,3] uint8: rows of degraded, restored at the sample's quality, restored at 1, wanted."""
        shown = slice(0, 4)
        lq, quality = batch.degraded[shown], batch.quality[shown]
        restored = state.ema.module(lq, quality)
        best = state.ema.module(lq, torch.ones_like(quality))
        return montage([lq, restored, best, batch.hq[shown]])

    def _order(self, state: TrainState, batch: Batch, *, judged: bool) -> Order:
        """What this step asks for; a wish only where the quality loss can teach it."""
        config = self.config
        if config.dial_fraction == 0 or not judged:
            return own_quality(batch.quality)
        share, between, weight = config.dial_fraction, config.dial_range, config.dial_code_weight
        return draw_wishes(batch.quality, share, between, weight, self.distributed, state.generator(DIAL))

    def _moves(self, state: TrainState, batch: Batch) -> Tensor:
        """How each sample's judged picture is moved in this step: see ``draw_jitter``."""
        count = len(batch) * self.distributed.world_size
        return draw_jitter(count, self.config.quality_jitter, state.generator(JITTER))[
            own_slots(len(batch), self.distributed)
        ]

    def _quality_losses(
        self, prior: nn.Module, state: TrainState, predicted: Prediction, order: Order, batch: Batch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(weighted losses, mean quality) of the pictures decoded from predicted codes."""
        config, network = self.config, state.network
        count = config.quality_samples or len(order.quality)
        # Samples with a random wish come first: nothing else teaches them.
        chosen = torch.argsort((~order.wished).int(), stable=True)[:count]
        logits, conditioned, raw = (part[chosen] for part in predicted[:3])
        part = Prediction(logits, conditioned, raw, {}, predicted.books)
        quality = order.quality[chosen]
        latent = discrete_latent(network, part, quality, config)
        if config.quality_restored and config.quality_grad != "continuous":
            latent = adaptive_instance_norm(latent, conditioned)
        with self.precision.autocast(latent.device):
            restored = network.decode(latent)
        if config.quality_restored:
            restored = keep_tones(restored.float(), batch.degraded[chosen], network.config.tones)
        seen = to_unit_range(restored)
        if config.quality_jitter:
            seen = jittered(seen, config.quality_jitter, self._moves(state, batch)[chosen.cpu()])
        measured, asked = judged(prior, seen, quality, self.prior_scores, state.generator(CROP))
        wanted = asked if config.quality_target == "match" else None
        losses = {"quality_loss": config.quality_weight * quality_loss(measured, wanted)}
        if config.quality_anchor > 0:
            losses["anchor_loss"] = config.quality_anchor * anchor_loss(restored, batch.hq[chosen])
        return losses, measured.mean()


def discrete_latent(
    network: RestorationNetwork, predicted: Prediction, quality: Tensor, config: Stage2Config
) -> Tensor:
    """Latent [B,d,h,h] that is decoded for the quality loss, with the configured gradient path.

    ``straight_through`` and ``logits`` have exactly the value of the most likely codes' vectors; their
    gradient goes to the conditioned latent, or through softmax to the logits of both codebooks.
    ``continuous`` is the conditioned latent itself.
    """
    if config.quality_grad == "continuous":
        return predicted.latent
    hard = network.lookup(predicted.codes, quality)
    if config.quality_grad == "straight_through":
        return straight_through(hard, predicted.latent)
    soft = network.soft_lookup(predicted.logits, config.quality_temperature, quality)
    return straight_through(hard, soft)
