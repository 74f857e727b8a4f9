"""The dial: a network that is asked for random qualities learns to give them; one that is not does not."""

import copy
import itertools
from dataclasses import replace
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
from iqpir.training.distributed import SINGLE, Distributed
from iqpir.training.order import sample_at


def test_only_chosen_samples_are_asked_for_something_else() -> None:
    quality = torch.tensor([0.1, 0.2, 0.3])
    chosen, places = torch.tensor([False, True, True]), torch.tensor([0.0, 0.0, 0.5])
    order = random_wish(quality, chosen, places, (0.4, 0.8), 0.25)
    torch.testing.assert_close(order.quality, torch.tensor([0.1, 0.4, 0.6]))
    assert order.weights.tolist() == [1.0, 0.25, 0.25]
    assert order.wished.tolist() == [False, True, True]
    several = random_wish(quality[:, None].expand(3, 2), chosen, places, (0.4, 0.8), 0.25)
    torch.testing.assert_close(several.quality, order.quality[:, None].expand(3, 2))


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


def measured(network: RestorationNetwork, tiny: ModuleType, prior: nn.Module) -> list[float]:
    """Quality of restored unseen pictures when asked for 0.35, 0.45, ... 0.85."""
    batch = textured(tiny, torch.arange(100, 132))
    with torch.no_grad():
        return [
            prior(to_unit_range(network(batch.lq, torch.full((32,), 0.35 + 0.1 * step)))).mean().item()
            for step in range(6)
        ]


@pytest.mark.slow
def test_measured_quality_rises_with_the_dial_once_it_is_taught(tiny: ModuleType) -> None:
    teacher, prior = stage_1(tiny), tiny.Sharpness()
    taught = Stage2Config(
        optimiser=tiny.RATE,
        quality_grad="logits",
        quality_target="match",
        quality_weight=5.0,
        dial_fraction=0.5,
        ema_decay=0.95,
    )
    curves = []
    for config in (taught, replace(taught, dial_fraction=0.0)):
        stage = Stage2(config, quality_prior=prior, teacher=copy.deepcopy(teacher))
        state = stage.initial_state(copy.deepcopy(teacher), seed=2)
        for state.step in range(300):
            stage.step(state, textured(tiny, drawn(state.step)))
        curves.append(measured(state.ema.module, tiny, prior))
    with_dial, without = curves
    assert with_dial[-1] - with_dial[0] > 0.2, curves
    assert all(later > earlier - 0.02 for earlier, later in itertools.pairwise(with_dial)), curves
    assert without[-1] - without[0] < 0.1, curves
