"""The adversarial part of stages 1 and 3: one balanced backward pass, and the discriminator's step."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from iqpir.errors import UsageError
from iqpir.losses import Perceptual, adversarial_weight, discriminator_loss, generator_loss, pixel_loss
from iqpir.networks.discriminator import Discriminator, DiscriminatorConfig
from iqpir.training.distributed import Distributed
from iqpir.training.optimiser import OptimiserConfig, apply_gradients, build_optimiser
from iqpir.training.precision import PrecisionConfig, prepare
from iqpir.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """The discriminator and how much it counts."""

    weight: float = 0.8
    """Factor of the adaptive weight of the adversarial loss; 0 trains without a discriminator."""
    largest: float = 1.0
    """Upper bound of the adaptive weight before the factor."""
    start_step: int = 30_001
    """Step from which on the discriminator is trained and counts."""
    base_channels: int = 64
    """Width of the discriminator."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation in the discriminator: ``batch`` as published; ``group`` does not depend on the number of
    ranks."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(
            learning_rate=7e-5, schedule="cosine", period=1_600_000, final_learning_rate=6e-5
        )
    )
    """Of the discriminator."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.largest <= 0 or self.start_step < 0:
            raise UsageError(
                f"Adversary weight {self.weight}, largest {self.largest} or start_step {self.start_step} "
                "is out of range.",
                "weight >= 0, largest > 0, start_step >= 0.",
            )

    def active_at(self, step: int) -> bool:
        """Whether the discriminator takes part in step ``step``, from 0."""
        return self.weight > 0 and step >= self.start_step


class PictureLosses(NamedTuple):
    """What one backward pass reports: detached 0-d tensors."""

    pixel: Tensor
    perceptual: Tensor
    adversarial: Tensor
    weight: Tensor
    """Of the adversarial loss; 0 without it."""

    @property
    def total(self) -> Tensor:
        """The loss that was minimised."""
        return self.pixel + self.perceptual + self.weight * self.adversarial

    def values(self) -> dict[str, Tensor]:
        """Each one under the name it is reported by."""
        return {
            "pixel_loss": self.pixel,
            "perceptual_loss": self.perceptual,
            "adversarial_loss": self.adversarial,
            "adversarial_weight": self.weight,
        }


@dataclass(frozen=True, kw_only=True)
class PictureObjective:
    """Weighted losses of restored pictures against wanted ones."""

    pixel_weight: float
    perceptual_weight: float
    perceptual: Perceptual | None

    def __post_init__(self) -> None:
        if self.perceptual_weight > 0 and self.perceptual is None:
            raise UsageError(
                f"perceptual_weight is {self.perceptual_weight}, but no perceptual loss was given.",
                "Name one, such as lpips or ms_ssim, or set perceptual_weight to 0.",
            )

    def of(self, restored: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(pixel, perceptual) losses, each weighted, 0-d."""
        pixel = self.pixel_weight * pixel_loss(restored, wanted)
        if self.perceptual is None or self.perceptual_weight == 0:
            return pixel, pixel.new_zeros(())
        return pixel, self.perceptual_weight * self.perceptual(restored, wanted)


class DiscriminatorPass(nn.Module):
    """Real and fake pictures through the discriminator in one forward, each with its own batch statistics."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B,3,R,R] -> logits of both."""
        return self.discriminator(real), self.discriminator(fake)


def add_discriminator(
    state: TrainState,
    config: AdversaryConfig,
    discriminator: nn.Module | None,
    precision: PrecisionConfig,
    distributed: Distributed,
) -> None:
    """Give ``state`` a discriminator (a new one where None is given), its optimiser and its pass."""
    device = next(state.network.parameters()).device
    if discriminator is None:
        size = DiscriminatorConfig.for_picture(state.network.config.image_size, config.norm)
        discriminator = Discriminator(replace(size, base_channels=config.base_channels))
    discriminator.to(device).train().requires_grad_(True)
    state.discriminator = prepare(discriminator, precision)
    state.optimisers["discriminator"] = build_optimiser(config.optimiser, discriminator.parameters())
    state.passes["discriminator"] = distributed.wrap(DiscriminatorPass(discriminator))
    discriminator.requires_grad_(False)


def discriminator_of(state: TrainState) -> nn.Module:
    """The discriminator of ``state``.

    Raises:
        UsageError: it has none, although an active adversary was configured.
    """
    if state.discriminator is None:
        raise UsageError("The training has no discriminator.", "Make its state with initial_state().")
    return state.discriminator


def critic_at(
    state: TrainState, config: AdversaryConfig, precision: PrecisionConfig
) -> Callable[[Tensor], Tensor] | None:
    """The frozen discriminator as a function of pictures, or None while it is not active."""
    if not config.active_at(state.step):
        return None
    discriminator = discriminator_of(state)

    def judge(pictures: Tensor) -> Tensor:
        with precision.autocast(pictures.device):
            judgements: Tensor = discriminator(pictures)
        return judgements

    return judge


def balanced_backward(
    restored: Tensor,
    wanted: Tensor,
    other_loss: Tensor | None,
    objective: PictureObjective,
    *,
    critic: Callable[[Tensor], Tensor] | None,
    balance: nn.Parameter,
    config: AdversaryConfig,
    distributed: Distributed,
) -> PictureLosses:
    """Backward of ``other_loss + picture losses + weight * adversarial loss``.

    The published way to balance the weight runs three backward passes through all losses. Here the
    gradients of both groups with respect to the pictures are computed once; the norms at ``balance``
    need only the few layers behind it, and one backward pass takes their weighted sum. Same gradients,
    same weight.

    Args:
        restored: [B,3,R,R] float32 with a graph behind it.
        wanted: [B,3,R,R].
        other_loss: 0-d, of the same graph; None: there is none.
        objective: pixel and perceptual losses.
        critic: frozen discriminator, or None before it starts.
        balance: the weight at which gradient norms are compared; averaged over ranks, so that every
            rank uses the weight that one process with the global batch would.
        config: factor and bound of the weight.
        distributed: the ranks.
    """
    leaf = restored.detach().requires_grad_()
    pixel, perceptual = objective.of(leaf, wanted)
    (gradient,) = torch.autograd.grad(pixel + perceptual, leaf)
    adversarial = weight = restored.new_zeros(())
    if critic is not None:
        adversarial = generator_loss(critic(leaf))
        (adversarial_gradient,) = torch.autograd.grad(adversarial, leaf)
        at_balance = [
            torch.autograd.grad(restored, balance, direction, retain_graph=True)[0]
            for direction in (gradient, adversarial_gradient)
        ]
        both = distributed.mean(torch.stack(at_balance))
        weight = adversarial_weight(both[0], both[1], config.largest, config.weight)
        gradient = gradient + weight * adversarial_gradient
    ends, directions = [restored], [gradient]
    if other_loss is not None:
        ends.append(other_loss)
        directions.append(torch.ones_like(other_loss))
    torch.autograd.backward(ends, directions)
    return PictureLosses(pixel.detach(), perceptual.detach(), adversarial.detach(), weight)


def train_discriminator(
    state: TrainState, config: AdversaryConfig, real: Tensor, fake: Tensor, precision: PrecisionConfig
) -> Tensor:
    """One step of the discriminator on real and restored pictures; returns its detached loss.

    Its parameters require a gradient only in here: the generator's step must not fill their gradients.
    """
    discriminator = discriminator_of(state)
    discriminator.requires_grad_(True)
    with precision.autocast(real.device):
        real_logits, fake_logits = state.passes["discriminator"](real, fake.detach())
    loss = discriminator_loss(real_logits, fake_logits)
    torch.autograd.backward(loss)
    apply_gradients(config.optimiser, state.optimisers["discriminator"], state.step)
    discriminator.requires_grad_(False)
    return loss.detach()
