"""Stage 3: fidelity. Encoder features correct the decoder, weighted by w; codes keep being learnt.

Frozen: codebooks and generator. Trained: what stage 2 trains, and the fidelity modules. Picture losses reach
the fidelity modules alone; losses against the codes reach the rest. Those ask each sample for its own quality:
a dial that stage 2 has taught is unlearnt, unless the rest stays as it is (``trained: fidelity``, ours).
Source: CodeFormer (arXiv 2206.11253), stage III, with the quality and both codebooks of IQPIR.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from iqpir.errors import UsageError
from iqpir.losses import Perceptual, quality_loss, to_unit_range
from iqpir.networks.fidelity import adaptive_instance_norm, keep_tones
from iqpir.networks.outcomes import Prediction
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.stages.adversary import (
    AdversaryConfig,
    PictureObjective,
    add_discriminator,
    balanced_backward,
    critic_at,
    train_discriminator,
)
from iqpir.stages.batch import Batch
from iqpir.stages.code_targets import (
    CodeLossConfig,
    accuracies,
    code_losses,
    require_same_codebooks,
    target_codes,
)
from iqpir.stages.dial import CROP, DIAL, Order, draw_wishes, judged, own_quality
from iqpir.stages.stage2 import TRAINED as STAGE2_TRAINED
from iqpir.stages.telemetry import code_health, count_codes, freeze_except, montage
from iqpir.training.distributed import SINGLE, Distributed
from iqpir.training.ema import Ema
from iqpir.training.optimiser import OptimiserConfig, apply_gradients, build_optimiser
from iqpir.training.precision import FP32, PrecisionConfig, prepare
from iqpir.training.state import TrainState

TRAINED: dict[str, tuple[str, ...]] = {
    "all": (*STAGE2_TRAINED, "fuse_convs_dict"),
    "fidelity": ("fuse_convs_dict",),
}


def _published_rate() -> OptimiserConfig:
    return OptimiserConfig(learning_rate=5e-5, schedule="cosine", period=150_000, final_learning_rate=2e-5)


@dataclass(frozen=True, kw_only=True)
class Stage3Config:
    """Losses and schedule of stage 3; the defaults are the published ones."""

    optimiser: OptimiserConfig = field(default_factory=_published_rate)
    """Of everything that is trained but the discriminator."""
    trained: Literal["all", "fidelity"] = "all"
    """What learns: ``all`` as published; ``fidelity`` (ours): the fidelity modules alone, and what stage 2 has taught,
    its dial too, stays as it is."""
    codes: CodeLossConfig = field(default_factory=CodeLossConfig)
    """Weights of the losses against the right codes; with ``trained: fidelity`` they are reported only."""
    quality_weight: float = 0.0
    """Weight of the distance of the judged from the asked quality, on steps with fidelity (ours): nothing else keeps
    fidelity from answering alike whatever is asked."""
    dial_fraction: float = 0.0
    """Share of samples that are asked for a random quality on those steps; their codes then do not count."""
    pixel_weight: float = 1.0
    """Weight of the mean absolute difference."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss; 0 needs none."""
    adversary: AdversaryConfig = field(
        default_factory=lambda: AdversaryConfig(weight=0.1, start_step=5_001, optimiser=_published_rate())
    )
    """The discriminator; trained on steps with fidelity only."""
    first_fidelity: float = 1.0
    """w of the first phase."""
    first_steps: int = 40_000
    """Steps of the first phase."""
    second_fidelity: float = 1.3
    """w of the second phase, and of single steps of the last one."""
    second_steps: int = 40_000
    """Steps of the second phase."""
    code_steps: int = 40_000
    """Steps of the third phase: codes alone, w = 0, for strongly degraded pictures."""
    fidelity_every: int = 15
    """In the last phase every so many steps have fidelity, the others are like the third phase."""
    ema_decay: float = 0.997
    """Decay of the averaged weights."""
    ema_warmup: bool = False
    """Average over fewer steps at first; for short trainings."""

    def __post_init__(self) -> None:
        if min(self.first_fidelity, self.second_fidelity) <= 0 or self.fidelity_every < 1:
            raise UsageError("first_fidelity, second_fidelity and fidelity_every must be positive.")
        if min(self.first_steps, self.second_steps, self.code_steps) < 0:
            raise UsageError("Phases of stage 3 must not have a negative number of steps.")
        if not 0.0 <= self.dial_fraction <= 1.0 or self.quality_weight < 0:
            raise UsageError("dial_fraction is a share in [0, 1]; quality_weight must not be negative.")
        if self.dial_fraction > 0 and self.quality_weight == 0:
            raise UsageError(
                "dial_fraction asks for random qualities, which nothing would teach.", "Set quality_weight above 0."
            )
        if self.trained == "fidelity" and (self.code_steps > 0 or self.fidelity_every > 1):
            raise UsageError(
                "trained is fidelity: steps without it would train nothing.",
                "Set code_steps to 0, fidelity_every to 1.",
            )

    def fidelity_at(self, step: int) -> float:
        """w of step ``step``, from 0; 0 means codes alone."""
        if step < self.first_steps:
            return self.first_fidelity
        if step < self.first_steps + self.second_steps:
            return self.second_fidelity
        alone = step < self.first_steps + self.second_steps + self.code_steps
        return 0.0 if alone or (step + 1) % self.fidelity_every else self.second_fidelity

    def degradation_at(self, step: int) -> Literal["small", "large"]:
        """How strongly the pictures of step ``step`` are meant to be degraded; the feed may follow it."""
        return "small" if self.fidelity_at(step) > 0 else "large"


class FidelityPass(nn.Module):
    """The forward that is wrapped for many ranks: prediction and, with fidelity, the restored pictures."""

    def __init__(self, network: RestorationNetwork, *, adain: bool) -> None:
        super().__init__()
        self.network = network
        self.adain = adain

    def forward(
        self, pictures: Tensor, quality: Tensor, fidelity: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """-> (logits, conditioned latent, encoder's latent, restored pictures or None without fidelity)."""
        predicted = self.network.predict(pictures, quality, taps=fidelity > 0)
        if fidelity > 0:
            latent = self.network.lookup(predicted.codes, quality).detach()
            if self.adain:
                latent = adaptive_instance_norm(latent, predicted.latent.detach())
            restored = self.network.decode(latent, predicted.taps, fidelity)
            return predicted.logits, predicted.latent, predicted.raw_latent, restored
        # Ranks wait for a gradient of every trained parameter; these get a zero that is thrown away.
        idle = torch.stack([p.sum() for p in self.network.fuse_convs_dict.parameters()]).sum() * 0.0
        return predicted.logits + idle, predicted.latent, predicted.raw_latent, None


class Stage3:
    """Stage 3.

    Args:
        config: losses and schedule.
        perceptual: distance of pictures in [-1,1]; needed when its weight is positive.
        quality_prior: [B,3,H,W] in [0,1] -> [B] in [0,1], differentiable, frozen; needed when its weight is positive.
        prior_scores: as for ``Stage2``.
        teacher: stage-1 network whose encoder makes codes for batches that have none.
        precision: number format and layout.
        distributed: the ranks.

    Raises:
        UsageError: a perceptual weight without a perceptual loss, or a quality weight without a prior.
    """

    name = "stage3"

    def __init__(
        self,
        config: Stage3Config,
        *,
        perceptual: Perceptual | None = None,
        quality_prior: nn.Module | None = None,
        prior_scores: Sequence[int] | None = None,
        teacher: RestorationNetwork | None = None,
        precision: PrecisionConfig = FP32,
        distributed: Distributed = SINGLE,
    ) -> None:
        if config.quality_weight > 0 and quality_prior is None:
            raise UsageError(
                f"quality_weight is {config.quality_weight}, but no quality prior was given.",
                "Name differentiable metrics, or set quality_weight to 0.",
            )
        self.quality_prior = None if quality_prior is None else quality_prior.eval().requires_grad_(False)
        self.prior_scores = prior_scores
        self.config = config
        self.precision = precision
        self.distributed = distributed
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.objective = PictureObjective(
            pixel_weight=config.pixel_weight,
            perceptual_weight=config.perceptual_weight,
            perceptual=perceptual,
        )

    def initial_state(
        self, network: RestorationNetwork, *, seed: int, discriminator: nn.Module | None = None
    ) -> TrainState:
        """A fresh state around ``network``, which has been through stage 2.

        Raises:
            UsageError: the network has no fidelity modules, or the teacher has other codebooks.
        """
        if not network.fuse_convs_dict:
            raise UsageError("The network has no fidelity modules.", "Give it connect_sizes.")
        self.distributed.synchronise(network)
        if self.teacher is not None:
            require_same_codebooks(self.teacher, network)
        freeze_except(network, TRAINED[self.config.trained])
        state = TrainState(
            network=network,
            ema=Ema(network, self.config.ema_decay, warmup=self.config.ema_warmup),
            optimisers={"network": build_optimiser(self.config.optimiser, network.parameters())},
            seed=seed,
        )
        state.passes["fidelity"] = self.distributed.wrap(
            # With the rest fixed the modules learn for what inference decodes; published, they do without its AdaIN.
            FidelityPass(prepare(network, self.precision), adain=self.config.trained == "fidelity")
        )
        if self.config.adversary.weight > 0:
            add_discriminator(state, self.config.adversary, discriminator, self.precision, self.distributed)
        return state

    def step(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        """One optimisation step, with the fidelity of its phase.

        Raises:
            UsageError: no degraded pictures, or neither codes nor a teacher.
        """
        codes = target_codes(batch, state.network, self.teacher)
        fidelity = self.config.fidelity_at(state.step)
        order = self._order(state, batch, fidelity)
        with self.precision.autocast(batch.hq.device):
            logits, latent, raw, restored = state.passes["fidelity"](batch.degraded, order.quality, fidelity)
        predicted = Prediction(logits.float(), latent.float(), raw.float(), {}, state.network.books)
        losses = code_losses(state.network, predicted, codes, batch.quality, order.weights, self.config.codes)
        code_total = torch.stack(list(losses.values())).sum()
        values = {name: value.detach() for name, value in losses.items()}
        if restored is None:
            torch.autograd.backward(code_total)
            values["loss"] = code_total.detach()
            # No gradient at all, so that the optimiser's momentum does not move them either.
            for parameter in state.network.fuse_convs_dict.parameters():
                parameter.grad = None
        else:
            # As inference gives it: else the modules would learn what the input's tones undo.
            restored = keep_tones(restored.float(), batch.degraded, state.network.config.tones)
            values |= self._backward_pictures(state, restored, batch.hq, code_total, order.quality)
        apply_gradients(self.config.optimiser, state.optimisers["network"], state.step)
        state.ema.update(state.step)
        if restored is not None and self.config.adversary.active_at(state.step):
            values["discriminator_loss"] = train_discriminator(
                state, self.config.adversary, batch.hq, restored, self.precision
            )
        found = predicted.codes
        count_codes(state, found)
        return values | accuracies(found, codes)

    def health(self, state: TrainState) -> dict[str, float]:
        """Usage, perplexity and dead codes among each codebook's predictions; learning rate; fidelity."""
        last = max(0, state.step - 1)
        return {
            **code_health(state, self.distributed),
            "learning_rate": self.config.optimiser.learning_rate_at(last),
            "fidelity": self.config.fidelity_at(last),
        }

    @torch.no_grad()
    def preview(self, state: TrainState, batch: Batch) -> Tensor:
        """[H,W,3] uint8: rows of degraded, restored with w 0 and w 1, wanted."""
        lq, quality = batch.degraded[:4], batch.quality[:4]
        restored = [state.ema.module(lq, quality, fidelity) for fidelity in (0.0, 1.0)]
        return montage([lq, *restored, batch.hq[:4]])

    def _order(self, state: TrainState, batch: Batch, fidelity: float) -> Order:
        """What this step asks for; a wish only where the quality loss can teach it."""
        share = self.config.dial_fraction
        if fidelity == 0 or share == 0:
            return own_quality(batch.quality)
        return draw_wishes(batch.quality, share, (0.0, 1.0), 0.0, self.distributed, state.generator(DIAL))

    def _backward_pictures(
        self, state: TrainState, restored: Tensor, wanted: Tensor, code_total: Tensor, quality: Tensor
    ) -> dict[str, Tensor]:
        others = [code_total] if self.config.trained == "all" else []
        values: dict[str, Tensor] = {}
        if self.quality_prior is not None and self.config.quality_weight > 0:
            seen = to_unit_range(restored)
            measured, asked = judged(self.quality_prior, seen, quality, self.prior_scores, state.generator(CROP))
            others.append(self.config.quality_weight * quality_loss(measured, asked))
            values = {"quality_loss": others[-1].detach(), "restored_quality": measured.mean().detach()}
        losses = balanced_backward(
            restored,
            wanted,
            torch.stack(others).sum() if others else None,
            self.objective,
            critic=critic_at(state, self.config.adversary, self.precision),
            balance=last_fidelity_weight(state.network),
            config=self.config.adversary,
            distributed=self.distributed,
        )
        total = torch.stack([losses.total, *(other.detach() for other in others)]).sum()
        return {**losses.values(), **values, "loss": total}


def last_fidelity_weight(network: RestorationNetwork) -> nn.Parameter:
    """Weight of the largest fidelity module's last convolution: where the adversarial loss is balanced."""
    size = max(network.config.connect_sizes)
    return network.get_parameter(f"fuse_convs_dict.{size}.shift.2.weight")
