"""A training small enough for a test: a 16 pixel network, drawn pictures, and a log that keeps everything."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from iqpir.config import NetworkConfig
from iqpir.networks.codebook import EmaConfig
from iqpir.networks.restoration_network import RestorationNetwork, build
from iqpir.stages.adversary import AdversaryConfig
from iqpir.stages.batch import Batch
from iqpir.stages.stage1 import Stage1Config
from iqpir.training.distributed import Distributed
from iqpir.training.loop import FitConfig, FitResult, Stage, fit
from iqpir.training.optimiser import OptimiserConfig
from iqpir.training.order import rank_slice, sample_at
from iqpir.training.state import TrainState

NETWORK = NetworkConfig(
    image_size=16,
    base_channels=16,
    channel_multipliers=(1, 2),
    res_blocks=1,
    attention_sizes=(8,),
    latent_channels=32,
    codebook_size=16,
    transformer_width=32,
    transformer_heads=2,
    transformer_layers=1,
    connect_sizes=(8,),
    hq_threshold=0.5,
)
SEED = 7
RATE = OptimiserConfig(learning_rate=1e-3)


def network(**changes: object) -> RestorationNetwork:
    """A fresh tiny network, always with the same weights."""
    torch.manual_seed(0)
    return build(NetworkConfig.from_dict({**NETWORK.to_dict(), **changes}))


def pictures(index: Tensor) -> Tensor:
    """One drawn picture per index: [B,3,16,16] in [-1,1]."""
    ramp = torch.linspace(-1, 1, 16)
    drawn = []
    for number in index.tolist():
        made = torch.Generator().manual_seed(number)
        colour, slope = torch.rand(2, 3, generator=made)
        phase = 6 * torch.rand(1, generator=made)
        wave = torch.sin(4 * ramp + phase)[None, :] * torch.cos(3 * ramp - phase)[:, None]
        drawn.append((colour[:, None, None] - 0.5) + 0.5 * wave + 0.3 * slope[:, None, None] * ramp)
    return torch.stack(drawn).clamp(-1, 1)


def batch(index: Tensor, codes: Tensor | None = None) -> Batch:
    """A batch of drawn pictures; qualities spread over [0,1]; degraded by losing half of the resolution."""
    hq = pictures(index)
    lq = functional.interpolate(functional.avg_pool2d(hq, 4), scale_factor=4.0)
    return Batch(
        hq=hq,
        lq=lq,
        quality=((index * 37) % 100).float() / 100,
        index=index,
        flipped=torch.zeros(len(index), dtype=torch.bool),
        codes=codes,
    )


class DrawnSource:
    """Batches of drawn pictures in the counter-based order."""

    def __init__(self, count: int, global_batch: int, distributed: Distributed | None = None) -> None:
        ranks = distributed or Distributed()
        self.count, self.global_batch = count, global_batch
        self.slots = rank_slice(global_batch, ranks.rank, ranks.world_size)

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        position = samples_seen
        while True:
            numbers = [sample_at(position + slot, self.count, SEED)[1] for slot in range(self.global_batch)]
            yield batch(torch.tensor(numbers)[self.slots])
            position += self.global_batch


class KeptLog:
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.images: dict[int, np.ndarray] = {}

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.values[step] = dict(values)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self.images[step] = picture


class Sharpness(nn.Module):
    """A differentiable quality in [0,1]: more local contrast is better."""

    def forward(self, unit: Tensor) -> Tensor:
        across = (unit[..., 1:] - unit[..., :-1]).abs().mean(dim=(1, 2, 3))
        return across / (across + 0.05)


def smooth_l2(restored: Tensor, wanted: Tensor) -> Tensor:
    """A stand-in with the interface of a perceptual loss: squared distance of blurred pictures."""
    return (functional.avg_pool2d(restored, 2) - functional.avg_pool2d(wanted, 2)).square().mean()


def stage1_config(**changes: object) -> Stage1Config:
    """Stage 1 with everything switched on from the first steps."""
    values: dict[str, object] = {
        "optimiser": RATE,
        "adversary": AdversaryConfig(start_step=1, base_channels=8, norm="group", optimiser=RATE),
        "codebook_training": "ema",
        "codebook_ema": EmaConfig(revive_every=2, decay=0.9),
        "warmup_steps": 2,
        "ema_decay": 0.9,
    }
    return Stage1Config(**{**values, **changes})  # type: ignore[arg-type]


def run(
    stage: Stage,
    state: TrainState,
    *,
    steps: int,
    folder: Path,
    sink: object,
    global_batch: int = 4,
    distributed: Distributed | None = None,
    **options: object,
) -> tuple[FitResult, KeptLog]:
    """``fit`` on drawn pictures, reporting each step."""
    log = KeptLog()
    ranks = distributed or Distributed()
    config = FitConfig(steps=steps, log_every=1, checkpoint_every=1000, stop_every=1)
    result = fit(
        stage,
        state,
        DrawnSource(12, global_batch, ranks),
        **{  # type: ignore[arg-type]
            "config": config,
            "sink": sink,
            "log": log,
            "workspace": folder / "workspace",
            "distributed": ranks,
            **options,
        },
    )
    return result, log
