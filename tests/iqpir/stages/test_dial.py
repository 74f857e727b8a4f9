"""The dial: a network that is asked for random qualities learns to give them; one that is not does not."""

import copy
import itertools
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from iqpir.losses import to_unit_range
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.networks.vector_quantizer import QuantiserConfig
from iqpir.stages.adversary import AdversaryConfig
from iqpir.stages.batch import Batch
from iqpir.stages.dial import draw_jitter, jittered, own_quality, random_wish
from iqpir.stages.stage1 import Stage1
from iqpir.stages.stage2 import Stage2, Stage2Config
from iqpir.stages.stage3 import Stage3, Stage3Config
from iqpir.training.distributed import SINGLE, Distributed
from iqpir.training.order import sample_at
from iqpir.training.state import TrainState


def test_only_chosen_samples_are_asked_for_something_else() -> None:
    quality = torch.tensor([0.1, 0.2, 0.3])
    chosen, places = torch.tensor([False, True, True]), torch.tensor([0.0, 0.0, 0.5])
    order = random_wish(quality, chosen, places, (0.4, 0.8), 0.25)
    torch.testing.assert_close(order.quality, torch.tensor([0.1, 0.4, 0.6]))
    assert order.weights.tolist() == [1.0, 0.25, 0.25]
    assert order.wished.tolist() == [False, True, True]
    several = random_wish(quality[:, None].expand(3, 2), chosen, places, (0.4, 0.8), 0.25)
    torch.testing.assert_close(several.quality, order.quality[:, None].expand(3, 2))
    apart = random_wish(quality[:, None].expand(3, 2), chosen, torch.stack([places, 1 - places], 1), (0.4, 0.8), 0.25)
    torch.testing.assert_close(apart.quality, torch.tensor([[0.1, 0.1], [0.4, 0.8], [0.6, 0.6]]))


def test_without_a_dial_everything_is_the_samples_own() -> None:
    order = own_quality(torch.tensor([0.1, 0.2]))
    assert (order.weights.tolist(), order.wished.tolist()) == ([1.0, 1.0], [False, False])


def test_jitter_moves_pictures_and_invents_no_pixel() -> None:
    pictures = torch.arange(2 * 3 * 12 * 12.0).view(2, 3, 12, 12)
    moves = [draw_jitter(2, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    moved = [jittered(pictures, 3, drawn) for drawn in moves]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    for before, after in zip(pictures, moved[0], strict=True):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())
        crops = [after[:, 3:-3, 3:-3], after[:, 3:-3, 3:-3].flip(-1)]
        places = before.unfold(1, 6, 1).unfold(2, 6, 1)
        assert any((places == crop[:, None, None]).all(dim=(0, 3, 4)).any() for crop in crops)


def test_a_sample_is_judged_alike_at_any_number_of_ranks(tiny: ModuleType) -> None:
    """The judged pictures of both ranks are, slot by slot, those of one rank with the global batch."""

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, unit: Tensor) -> Tensor:
            self.seen.append(unit.detach())
            return unit.mean(dim=(1, 2, 3))

    def judged(index: Tensor, ranks: Distributed) -> Tensor:
        prior = Recording()
        config = Stage2Config(optimiser=tiny.RATE, quality_jitter=3)
        made = Stage2(config, quality_prior=prior, teacher=tiny.network())
        state = made.initial_state(tiny.network(), seed=tiny.SEED)
        # Weights need no process group to be those of rank 0 here, and one step is judged before any gradient.
        made.distributed = ranks
        made.step(state, tiny.batch(index))
        return prior.seen[0]

    index = torch.arange(6)
    alone = judged(index, SINGLE)
    both = [judged(index[3 * rank : 3 * rank + 3], Distributed(rank=rank, world_size=2)) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(both), alone, atol=1e-5, rtol=0)


def textured(tiny: ModuleType, index: Tensor) -> Batch:
    """Pictures with stripes of varying strength, which are what the prior calls quality."""
    pictures = tiny.pictures(index)
    phase = torch.sin(torch.arange(16.0)[None, :] * 3.0 + index[:, None])
    strength = 0.35 * ((index * 37) % 100) / 100
    hq = (0.7 * pictures + strength[:, None, None, None] * phase[:, None, None, :]).clamp(-1, 1)
    lq = functional.interpolate(functional.avg_pool2d(hq, 4), scale_factor=4.0)
    quality = tiny.Sharpness()(to_unit_range(hq))
    return replace(tiny.batch(index), hq=hq, lq=lq, quality=quality)


def drawn(step: int) -> Tensor:
    return torch.tensor([sample_at(step * 8 + slot, 64, 3)[1] for slot in range(8)])


def stage_1(tiny: ModuleType) -> RestorationNetwork:
    config = tiny.stage1_config(
        warmup_steps=600,
        perceptual_weight=0.0,
        quantiser=QuantiserConfig(commitment_weight=0.25),
        adversary=AdversaryConfig(weight=0.0),
    )
    stage = Stage1(config)
    state = stage.initial_state(tiny.network(codebook_size=64, hq_threshold=0.6), seed=1)
    for state.step in range(900):
        stage.step(state, textured(tiny, drawn(state.step)))
    return state.ema.module


def measured(network: RestorationNetwork, tiny: ModuleType, prior: nn.Module, fidelity: float = 0.0) -> list[float]:
    """Quality of restored unseen pictures when asked for 0.35, 0.45, ... 0.85."""
    batch = textured(tiny, torch.arange(100, 132))
    with torch.no_grad():
        return [
            prior(to_unit_range(network(batch.lq, torch.full((32,), 0.35 + 0.1 * step), fidelity))).mean().item()
            for step in range(6)
        ]


@dataclass(frozen=True)
class Taught:
    """Networks of stage 1, and of stage 2 with wishes and without."""

    teacher: RestorationNetwork
    with_dial: RestorationNetwork
    without: RestorationNetwork


@pytest.fixture(scope="module")
def taught(tiny: ModuleType) -> Taught:
    teacher = stage_1(tiny)
    wishes = Stage2Config(
        optimiser=tiny.RATE,
        quality_grad="logits",
        quality_target="match",
        quality_weight=5.0,
        dial_fraction=0.5,
        ema_decay=0.95,
    )
    networks = []
    for config in (wishes, replace(wishes, dial_fraction=0.0)):
        stage = Stage2(config, quality_prior=tiny.Sharpness(), teacher=copy.deepcopy(teacher))
        networks.append(trained(tiny, stage, stage.initial_state(copy.deepcopy(teacher), seed=2), 300))
    return Taught(teacher, *networks)


def trained(tiny: ModuleType, stage: Stage2 | Stage3, state: TrainState, steps: int) -> RestorationNetwork:
    for state.step in range(steps):
        stage.step(state, textured(tiny, drawn(state.step)))
    return state.ema.module


@pytest.mark.slow
def test_measured_quality_rises_with_the_dial_once_it_is_taught(tiny: ModuleType, taught: Taught) -> None:
    with_dial, without = (measured(network, tiny, tiny.Sharpness()) for network in (taught.with_dial, taught.without))
    assert with_dial[-1] - with_dial[0] > 0.2, with_dial
    assert all(later > earlier - 0.02 for earlier, later in itertools.pairwise(with_dial)), with_dial
    assert without[-1] - without[0] < 0.1, without


def psnr(network: RestorationNetwork, tiny: ModuleType, fidelity: float) -> float:
    """Mean over unseen pictures, asked for more quality than most originals have."""
    batch = textured(tiny, torch.arange(100, 132))
    with torch.no_grad():
        restored = network(batch.lq, torch.full((32,), 0.85), fidelity).clamp(-1, 1)
    return float((-10 * torch.log10(((restored - batch.hq) / 2).square().mean(dim=(1, 2, 3)))).mean())


@pytest.mark.slow
def test_stage_3_brings_fidelity_and_keeps_the_dial_where_it_trains_nothing_else(
    tiny: ModuleType, taught: Taught
) -> None:
    """Losses against codes, which the published stage 3 goes on with, unlearn the dial."""
    config = Stage3Config(
        trained="fidelity",
        optimiser=tiny.RATE,
        perceptual_weight=0.0,
        adversary=AdversaryConfig(weight=0.0),
        code_steps=0,
        fidelity_every=1,
        ema_decay=0.9,
    )
    before = measured(taught.with_dial, tiny, tiny.Sharpness())
    found = []
    for settings in (
        config,
        replace(config, quality_weight=0.2, dial_fraction=0.5),
        replace(config, trained="all"),
    ):
        stage = Stage3(settings, quality_prior=tiny.Sharpness(), teacher=copy.deepcopy(taught.teacher))
        found.append(trained(tiny, stage, stage.initial_state(copy.deepcopy(taught.with_dial), seed=3), 60))
    alone, asked, everything = found
    assert psnr(alone, tiny, 1.0) > psnr(alone, tiny, 0.5) + 0.5 > psnr(alone, tiny, 0.0) + 1.0
    assert measured(alone, tiny, tiny.Sharpness()) == before, "w = 0 is what it was"
    faithful = measured(alone, tiny, tiny.Sharpness(), 1.0)
    assert all(later > earlier - 0.02 for earlier, later in itertools.pairwise(faithful)), faithful
    assert 0.1 < faithful[-1] - faithful[0] < before[-1] - before[0]
    both = measured(asked, tiny, tiny.Sharpness(), 1.0)
    assert both[-1] - both[0] > faithful[-1] - faithful[0] + 0.05, "a quality loss keeps more of the dial at w = 1"
    assert psnr(alone, tiny, 1.0) > psnr(asked, tiny, 1.0) > psnr(asked, tiny, 0.0) + 0.5, "and costs some fidelity"
    unlearnt = measured(everything, tiny, tiny.Sharpness())
    assert unlearnt[-1] - unlearnt[0] < 0.5 * (before[-1] - before[0])
