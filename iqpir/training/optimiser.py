"""Adam and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from iqpir.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """Adam with a schedule. The learning rate depends on the step alone, so resuming needs no state."""

    learning_rate: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """How the learning rate goes on."""
    period: int = 0
    """Steps of the cosine from learning_rate to final_learning_rate, where it stays."""
    final_learning_rate: float = 0.0
    """Where the cosine ends."""
    milestones: tuple[int, ...] = ()
    """Steps at which multistep multiplies the learning rate by gamma."""
    gamma: float = 0.5
    """Factor of multistep at each milestone."""
    gradient_clip: float = 0.0
    """Largest norm of all gradients together; 0 clips nothing."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate {self.learning_rate} must be positive.")
        if self.schedule == "cosine" and self.period < 1:
            raise UsageError("A cosine schedule needs a period.", "Set period to the number of steps.")
        if self.schedule == "multistep" and not self.milestones:
            raise UsageError("A multistep schedule needs milestones.", "Set milestones, in steps.")
        if self.gradient_clip < 0:
            raise UsageError(f"gradient_clip {self.gradient_clip} must not be negative.")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step ``step``, from 0."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        rate = self.learning_rate
        if self.schedule == "cosine":
            share = min(1.0, step / self.period)
            floor = self.final_learning_rate
            rate = floor + 0.5 * (rate - floor) * (1 + math.cos(math.pi * share))
        elif self.schedule == "multistep":
            rate *= self.gamma ** sum(step >= milestone for milestone in self.milestones)
        return rise * rate


def build_optimiser(config: OptimiserConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Adam over those ``parameters`` that require a gradient; one fused kernel on a GPU.

    With weight_decay 0 this is the published Adam.

    Raises:
        UsageError: everything is frozen.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UsageError("Nothing to train: every parameter is frozen.")
    on_gpu = all(parameter.device.type == "cuda" for parameter in trained)
    return torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=config.betas,
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=on_gpu or None,
        foreach=None if on_gpu else True,
    )


def hasten(optimiser: torch.optim.AdamW, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Let ``parameters``, which the optimiser has already, learn ``rate`` times as fast as the others.

    With rate 1 the optimiser, and what a checkpoint keeps of it, stays as it is.
    """
    chosen = {id(parameter) for parameter in parameters}
    (group,) = optimiser.param_groups
    fast = [parameter for parameter in group["params"] if id(parameter) in chosen]
    if rate == 1.0 or not fast:
        return
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    optimiser.add_param_group({**group, "params": fast, "rate": rate})


def apply_gradients(config: OptimiserConfig, optimiser: torch.optim.Optimizer, step: int) -> None:
    """One optimiser step with the learning rate of ``step``; the gradients are used up."""
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate_at(step) * group.get("rate", 1.0)
    if config.gradient_clip:
        # All groups at once: clipped apart, their gradients would keep another direction and a larger norm.
        everything = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(everything, config.gradient_clip, foreach=True)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
