"""Stage 1: learn the autoencoder and both codebooks from good pictures.

Trained: encoder, codebooks, generator, and a discriminator after a start step.
Source: IQPIR (arXiv 2603.29773), on VQGAN (arXiv 2012.09841).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from iqpir.errors import UsageError
from iqpir.losses import Perceptual
from iqpir.networks.codebook import EmaCodebook, EmaConfig
from iqpir.networks.conditioning import consensus
from iqpir.networks.outcomes import Quantised
from iqpir.networks.restoration_network import AUTOENCODER_PARTS, RestorationNetwork
from iqpir.networks.vector_quantizer import QuantiserConfig
from iqpir.stages.adversary import (
    AdversaryConfig,
    PictureObjective,
    add_discriminator,
    balanced_backward,
    critic_at,
    train_discriminator,
)
from iqpir.stages.batch import Batch
from iqpir.stages.telemetry import code_health, count_codes, freeze_except, montage
from iqpir.training.distributed import SINGLE, Distributed
from iqpir.training.ema import Ema
from iqpir.training.optimiser import OptimiserConfig, apply_gradients, build_optimiser
from iqpir.training.precision import FP32, PrecisionConfig, prepare
from iqpir.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Losses and schedule of stage 1; the defaults are the published ones."""

    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(
            learning_rate=7e-5, schedule="cosine", period=1_600_000, final_learning_rate=6e-5
        )
    )
    """Of the autoencoder."""
    pixel_weight: float = 1.0
    """Weight of the mean absolute difference."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss; 0 needs none."""
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    """The discriminator."""
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    """Inner weights of the codebook losses, and the gradient estimator."""
    quantiser_weight: float = 1.0
    """Weight of the codebook losses of both books."""
    codebook_training: Literal["loss", "ema"] = "loss"
    """``loss``: codes follow their latents by gradient (published); ``ema``: by moving averages, with a
    k-means start and revival of dead codes."""
    codebook_ema: EmaConfig = field(default_factory=EmaConfig)
    """Rates of ``ema``."""
    warmup_steps: int = 0
    """Steps without quantisation before the codes are placed; needs ``ema``."""
    ema_decay: float = 0.995
    """Decay of the averaged weights."""
    ema_warmup: bool = False
    """Average over fewer steps at first; for short trainings."""

    def __post_init__(self) -> None:
        if min(self.pixel_weight, self.perceptual_weight, self.quantiser_weight, self.warmup_steps) < 0:
            raise UsageError("Weights and warmup_steps of stage 1 must not be negative.")
        if self.warmup_steps and self.codebook_training != "ema":
            raise UsageError(
                f"warmup_steps {self.warmup_steps} needs codebooks that can be placed afterwards.",
                "Set codebook_training to ema, or warmup_steps to 0.",
            )


class AutoencoderPass(nn.Module):
    """The forward that is wrapped for many ranks."""

    def __init__(self, network: RestorationNetwork, config: QuantiserConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, pictures: Tensor, quality: Tensor, quantised: bool) -> tuple[Tensor, Tensor, Quantised | None]:
        """-> (restored pictures, encoder's latent z, what the codebooks made of z or None without them)."""
        if quantised:
            result = self.network.reconstruct(pictures, quality, self.config)
            return result.pictures, result.raw_latent, result.quantised
        latent = self.network.encode(pictures)
        return self.network.decode(_unquantised(self.network, latent, quality)), latent, None


class Stage1:
    """Stage 1.

    Args:
        config: losses and schedule.
        perceptual: distance of pictures in [-1,1]; needed when its weight is positive.
        precision: number format and layout.
        distributed: the ranks.

    Raises:
        UsageError: a perceptual weight without a perceptual loss.
    """

    name = "stage1"

    def __init__(
        self,
        config: Stage1Config,
        *,
        perceptual: Perceptual | None = None,
        precision: PrecisionConfig = FP32,
        distributed: Distributed = SINGLE,
    ) -> None:
        self.config = config
        self.precision = precision
        self.distributed = distributed
        self.objective = PictureObjective(
            pixel_weight=config.pixel_weight,
            perceptual_weight=config.perceptual_weight,
            perceptual=perceptual,
        )
        self.quantiser = (
            replace(config.quantiser, codebook_weight=0.0) if config.codebook_training == "ema" else config.quantiser
        )

    def initial_state(
        self, network: RestorationNetwork, *, seed: int, discriminator: nn.Module | None = None
    ) -> TrainState:
        """A fresh state around ``network`` (on its device); a discriminator is made where none is given."""
        self.distributed.synchronise(network)
        freeze_except(network, AUTOENCODER_PARTS)
        codebooks: dict[str, EmaCodebook] = {}
        if self.config.codebook_training == "ema":
            codebooks["common"] = EmaCodebook(network.quantize, self.config.codebook_ema, seed)
            if network.quantize_aesthetic is not None:
                codebooks["hq"] = EmaCodebook(network.quantize_aesthetic, self.config.codebook_ema, seed + 1)
        copied = ("quantize", "quantize_aesthetic") if codebooks else ()
        ema = Ema(network, self.config.ema_decay, warmup=self.config.ema_warmup, copied=copied)
        state = TrainState(
            network=network,
            ema=ema,
            optimisers={"network": build_optimiser(self.config.optimiser, network.parameters())},
            seed=seed,
            codebooks=codebooks,
        )
        autoencoder = AutoencoderPass(prepare(network, self.precision), self.quantiser)
        state.passes["autoencoder"] = self.distributed.wrap(autoencoder)
        if self.config.adversary.weight > 0:
            add_discriminator(state, self.config.adversary, discriminator, self.precision, self.distributed)
        return state

    def step(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """One optimisation step of the autoencoder, then, once active, one of the discriminator."""
        quantised = state.step >= self.config.warmup_steps
        if quantised:
            self._start_codebooks(state, batch)
        with self.precision.autocast(batch.hq.device):
            restored, latent, found = state.passes["autoencoder"](batch.hq, batch.quality, quantised)
        restored = restored.float()
        values = {} if found is None else _codebook_losses(found)
        codebook_loss = None if found is None else self.config.quantiser_weight * found.loss
        critic = critic_at(state, self.config.adversary, self.precision)
        losses = balanced_backward(
            restored,
            batch.hq,
            codebook_loss,
            self.objective,
            critic=critic,
            balance=state.network.generator.last_weight,
            config=self.config.adversary,
            distributed=self.distributed,
        )
        apply_gradients(self.config.optimiser, state.optimisers["network"], state.step)
        if found is not None:
            self._update_codebooks(state, latent, found)
            count_codes(state, found.codes, found.gate)
        state.ema.update(state.step)
        values |= losses.values()
        values["loss"] = losses.total if codebook_loss is None else losses.total + codebook_loss.detach()
        if critic is not None:
            values["discriminator_loss"] = train_discriminator(
                state, self.config.adversary, batch.hq, restored, self.precision
            )
        return values

    def health(self, state: TrainState) -> dict[str, float]:
        """Usage, perplexity and dead codes of each codebook; the learning rate."""
        rate = self.config.optimiser.learning_rate_at(max(0, state.step - 1))
        return {**code_health(state, self.distributed), "learning_rate": rate}

    @torch.no_grad()
    def preview(self, state: TrainState, batch: Batch) -> Tensor:
        """[H,W,3] uint8: rows of the pictures and of what the averaged network makes of them."""
        pictures, quality = batch.hq[:8], batch.quality[:8]
        quantised = state.step > self.config.warmup_steps
        restored = AutoencoderPass(state.ema.module, self.quantiser)(pictures, quality, quantised)[0]
        return montage([pictures, restored])

    @torch.no_grad()
    def _start_codebooks(self, state: TrainState, batch: Batch) -> None:
        """Place codebooks that wait: by k-means on this batch's latents, HQ+ on its gated ones."""
        waiting = [book for book in state.codebooks.values() if not book.started]
        if not waiting:
            return
        with self.precision.autocast(batch.hq.device):
            latent = state.network.encode(batch.hq).float()
        common = state.codebooks["common"]
        if not common.started:
            common.start(latent)
        hq = state.codebooks.get("hq")
        if hq is not None and not hq.started:
            codes = state.network.quantize.assign(latent)
            hq.start(_hq_input(state.network, latent, codes), _gate(state.network, batch.quality))

    @torch.no_grad()
    def _update_codebooks(self, state: TrainState, latent: Tensor, found: Quantised) -> None:
        if not state.codebooks:
            return
        latent = latent.detach().float()
        # Both from the codes this step used: the common update must not move what HQ+ was given.
        hq_input = _hq_input(state.network, latent, found.codes[:, 0])
        state.codebooks["common"].update(latent, found.codes[:, 0])
        hq = state.codebooks.get("hq")
        if hq is not None and hq.started:
            hq.update(hq_input, found.codes[:, 1], found.gate)


def _codebook_losses(found: Quantised) -> dict[str, Tensor]:
    values = {"common_codebook_loss": found.common_loss.mean().detach()}
    if found.hq_loss is not None:
        values["hq_codebook_loss"] = found.hq_loss.mean().detach()
        values["hq_share"] = found.gate.float().mean()
    return values


def _gate(network: RestorationNetwork, quality: Tensor) -> Tensor:
    return consensus(quality) > network.config.hq_threshold


def _hq_input(network: RestorationNetwork, latent: Tensor, common_codes: Tensor) -> Tensor:
    if not network.config.residual_hq:
        return latent
    return latent - network.quantize.lookup(common_codes)


def _unquantised(network: RestorationNetwork, latent: Tensor, quality: Tensor) -> Tensor:
    """What the generator would get if every code were exactly its latent: same scale as later."""
    if network.books == 1 or network.config.residual_hq:
        return latent
    gate = _gate(network, quality)
    if network.attention is not None:
        fused: Tensor = network.attention(latent, latent, gate)
        return fused
    return latent * (1 + network.config.alpha * gate[:, None, None, None])
