"""Everything a training changes; what a checkpoint holds is exactly this."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from iqpir.networks.codebook import EmaCodebook
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.training.ema import Ema
from iqpir.training.order import derive_key


@dataclass(kw_only=True)
class TrainState:
    """One rank's training between two steps."""

    network: RestorationNetwork
    """What is trained."""
    ema: Ema
    """Its averaged copy: what is used."""
    optimisers: dict[str, torch.optim.Optimizer]
    """``network`` and, with a discriminator, ``discriminator``."""
    seed: int
    """Of the training; the same on every rank."""
    discriminator: nn.Module | None = None
    """Of the adversarial loss."""
    codebooks: dict[str, EmaCodebook] = field(default_factory=dict)
    """``common`` and ``hq`` when codebooks follow their own moving average, else empty."""
    step: int = 0
    """Optimisation steps done."""
    samples_seen: int = 0
    """Samples consumed over all ranks; the position in the sample order."""
    passes: dict[str, nn.Module] = field(default_factory=dict)
    """Forward passes as wrapped for many ranks; made by the stage, not saved."""
    code_counts: dict[str, Tensor] = field(default_factory=dict)
    """[K] int64 per codebook: codes used since the last report; not saved."""

    def generator(self, purpose: int) -> torch.Generator:
        """A CPU generator that depends on (seed, step, purpose) alone: equal on every rank."""
        made = torch.Generator()
        made.manual_seed(derive_key(self.seed, self.step, purpose) >> 1)
        return made


def capture_rng() -> dict[str, Any]:
    """State of this process's global random generators, loadable with ``weights_only``."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Inverse of ``capture_rng``; a GPU state is left out on a machine with another number of GPUs."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
