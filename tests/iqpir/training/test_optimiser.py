"""Learning rates, clipping and averaged weights have the values of their formulas."""

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from iqpir.errors import UsageError
from iqpir.stages.stage1 import Stage1Config
from iqpir.stages.telemetry import freeze_except
from iqpir.training.ema import Ema
from iqpir.training.optimiser import OptimiserConfig, apply_gradients, build_optimiser, hasten


def test_constant_with_warm_up() -> None:
    config = OptimiserConfig(learning_rate=1.0, warmup_steps=4)
    assert [config.learning_rate_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_goes_from_rate_to_floor_and_stays() -> None:
    config = OptimiserConfig(learning_rate=3.0, schedule="cosine", period=10, final_learning_rate=1.0)
    assert [config.learning_rate_at(step) for step in (0, 5, 10, 99)] == pytest.approx([3, 2, 1, 1])
    assert config.learning_rate_at(2) == pytest.approx(2 + math.cos(0.2 * math.pi))


def test_multistep_multiplies_at_its_milestones() -> None:
    config = OptimiserConfig(learning_rate=8.0, schedule="multistep", milestones=(2, 4), gamma=0.5)
    assert [config.learning_rate_at(step) for step in range(6)] == [8, 8, 4, 4, 2, 2]


def test_published_stage_1_rate() -> None:
    config = Stage1Config().optimiser
    assert config.learning_rate_at(0) == 7e-5
    assert config.learning_rate_at(1_600_000) == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"schedule": "cosine"}, "period"),
        ({"schedule": "multistep"}, "milestones"),
        ({"gradient_clip": -1.0}, "gradient_clip"),
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OptimiserConfig(**values)  # type: ignore[arg-type]


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    optimiser = build_optimiser(OptimiserConfig(), layer.parameters())
    assert optimiser.param_groups[0]["params"] == [layer.weight]
    with pytest.raises(UsageError, match="frozen"):
        build_optimiser(OptimiserConfig(), [layer.bias])


def test_the_first_step_of_adam_is_the_rate_of_that_step() -> None:
    value = nn.Parameter(torch.zeros(1))
    config = OptimiserConfig(learning_rate=1.0, warmup_steps=4)
    optimiser = build_optimiser(config, [value])
    value.grad = torch.tensor([5.0])
    apply_gradients(config, optimiser, step=1)
    assert value.item() == pytest.approx(-0.5, abs=1e-6)
    assert value.grad is None


def test_clipping_bounds_the_norm_of_all_gradients() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    config = OptimiserConfig(gradient_clip=1.0)
    optimiser = build_optimiser(config, [first, second])
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    apply_gradients(config, optimiser, step=0)
    moments = [optimiser.state[p]["exp_avg"].item() for p in (first, second)]
    assert moments == pytest.approx([0.06, 0.08], rel=1e-4)


def test_clipping_bounds_the_norm_over_groups_of_another_rate() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    config = OptimiserConfig(gradient_clip=1.0)
    optimiser = build_optimiser(config, [first, second])
    hasten(optimiser, [second], 10.0)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    apply_gradients(config, optimiser, step=0)
    moments = [optimiser.state[p]["exp_avg"].item() for p in (first, second)]
    assert moments == pytest.approx([0.06, 0.08], rel=1e-4)


def test_averages_follow_trained_weights_and_copy_named_codebooks(tiny: ModuleType) -> None:
    network = tiny.network()
    freeze_except(network, ("encoder",))
    ema = Ema(network, decay=0.75, copied=("quantize",))
    start = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1.0
    ema.update(0)
    got = ema.module.state_dict()
    key = "encoder.blocks.0.weight"
    torch.testing.assert_close(got[key], start[key] + 0.25)
    key = "quantize.embedding.weight"
    assert torch.equal(got[key], start[key] + 1.0)
    key = "quantize_aesthetic.embedding.weight"
    assert torch.equal(got[key], start[key]), "frozen and not named: it never changes"
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_warm_up_forgets_the_start(tiny: ModuleType) -> None:
    ema = Ema(tiny.network(), decay=0.9, warmup=True)
    assert [round(ema.decay_at(step), 4) for step in (0, 1, 10, 1000)] == [0.1, 0.1818, 0.55, 0.9]
    assert Ema(tiny.network(), decay=0.9).decay_at(0) == 0.9


def test_configurations_compare_by_value() -> None:
    assert replace(Stage1Config(), ema_decay=0.5) != Stage1Config()
    assert Stage1Config() == Stage1Config()


def test_hastened_parameters_take_longer_steps_and_the_rest_stays() -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    slow, fast = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    config = OptimiserConfig(learning_rate=0.01)
    optimiser = build_optimiser(config, [slow, fast])
    hasten(optimiser, [fast], 1.0)
    assert len(optimiser.param_groups) == 1
    hasten(optimiser, [fast], 10.0)
    for parameter in (slow, fast):
        parameter.grad = torch.ones(2)
    state = optimiser.state_dict()
    apply_gradients(config, optimiser, 0)
    torch.testing.assert_close(slow.detach(), torch.full((2,), -0.01))
    torch.testing.assert_close(fast.detach(), torch.full((2,), -0.1))
    optimiser.load_state_dict(state)
    assert [group.get("rate", 1.0) for group in optimiser.param_groups] == [1.0, 10.0]
