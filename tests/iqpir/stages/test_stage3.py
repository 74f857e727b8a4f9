"""Stage 3: its phases, and that picture losses train the fidelity modules alone."""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from iqpir.errors import UsageError
from iqpir.losses import to_unit_range
from iqpir.networks.fidelity import keep_tones
from iqpir.stages.code_targets import CodeLossConfig
from iqpir.stages.stage3 import Stage3, Stage3Config, last_fidelity_weight
from iqpir.training.state import TrainState


def started(
    tiny: ModuleType, network: Mapping[str, object] | None = None, **changes: object
) -> tuple[Stage3, TrainState]:
    values: dict[str, object] = {
        "optimiser": tiny.RATE,
        "adversary": tiny.stage1_config().adversary,
        "first_steps": 2,
        "second_steps": 1,
        "code_steps": 1,
        "fidelity_every": 2,
    }
    stage = Stage3(
        Stage3Config(**{**values, **changes}),  # type: ignore[arg-type]
        perceptual=tiny.smooth_l2,
        teacher=tiny.network(**(network or {})),
    )
    return stage, stage.initial_state(tiny.network(**(network or {})), seed=1)


def test_published_phases() -> None:
    config = Stage3Config()
    at = {step: config.fidelity_at(step) for step in (0, 39_999, 40_000, 79_999, 80_000, 119_999)}
    assert list(at.values()) == [1.0, 1.0, 1.3, 1.3, 0.0, 0.0]
    # Iterations from 1: those above 120000 that 15 divides.
    assert [step + 1 for step in range(120_000, 120_040) if config.fidelity_at(step) > 0] == [
        120_015,
        120_030,
    ]
    assert config.degradation_at(0) == "small"
    assert config.degradation_at(100_000) == "large"


def test_picture_losses_train_the_fidelity_modules_alone(tiny: ModuleType) -> None:
    nothing = CodeLossConfig(feature_weight=0.0, code_weight=0.0)
    stage, state = started(tiny, codes=nothing)
    found: dict[str, float] = {}
    for name, parameter in state.network.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: found.__setitem__(name, float(p.grad.abs().max()))
            )
    stage.step(state, tiny.batch(torch.arange(1, 5)))
    reached = {name for name, value in found.items() if value > 0}
    assert reached == {name for name in found if name.startswith("fuse_convs_dict")}
    assert reached == {n for n, _ in state.network.named_parameters() if n.startswith("fuse_convs_dict")}


def test_steps_without_fidelity_leave_the_fidelity_modules_and_the_discriminator_alone(
    tiny: ModuleType,
) -> None:
    stage, state = started(tiny)
    batch = tiny.batch(torch.arange(1, 5))
    for state.step in range(3):
        assert "pixel_loss" in stage.step(state, batch)
    fuse = last_fidelity_weight(state.network)
    before = fuse.clone(), {k: v.clone() for k, v in state.discriminator.state_dict().items()}
    encoder = state.network.encoder.blocks[0].weight.clone()
    state.step = 3
    values = stage.step(state, batch)
    assert "pixel_loss" not in values
    assert torch.equal(fuse, before[0]), "momentum must not move what has no gradient"
    assert all(torch.equal(v, before[1][k]) for k, v in state.discriminator.state_dict().items())
    assert not torch.equal(state.network.encoder.blocks[0].weight, encoder)
    assert stage.health(state)["fidelity"] == 1.3


def test_codebooks_and_generator_are_frozen(tiny: ModuleType) -> None:
    stage, state = started(tiny)
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    stage.step(state, tiny.batch(torch.arange(1, 5)))
    for key, value in state.network.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(("quantize", "generator")), key


def test_the_balance_is_the_last_convolution_of_the_largest_module(tiny: ModuleType) -> None:
    network = tiny.network(connect_sizes=[8, 16])
    assert last_fidelity_weight(network) is network.fuse_convs_dict["16"].shift[-1].weight


def test_the_quality_and_both_codebooks_are_learnt_in_each_phase(tiny: ModuleType) -> None:
    stage, state = started(tiny)
    batch = tiny.batch(torch.arange(1, 5))
    for state.step in (0, 3):
        before = state.network.score_embed.weight.clone()
        values = stage.step(state, batch)
        assert values["common_code_loss"] > 0 and values["hq_code_loss"] > 0
        assert not torch.equal(state.network.score_embed.weight, before)


@pytest.mark.parametrize(
    "network",
    [
        *({"fusion": "attention"}, {"residual_hq": True}, {"hq_gate": "paper"}),
        *({"conditioning": "adaln"}, {"codebooks": "single"}, {"quality_bins": [4, 4]}),
    ],
)
def test_variants_train_with_and_without_fidelity(tiny: ModuleType, network: dict[str, object]) -> None:
    stage, state = started(tiny, network)
    frozen = {k: v.clone() for k, v in state.network.autoencoder_state().items() if not k.startswith("encoder")}
    fused = last_fidelity_weight(state.network).clone()
    for state.step in (2, 3):
        values = stage.step(state, tiny.batch(torch.arange(1, 5)))
        assert all(value.isfinite() and not value.requires_grad for value in values.values())
        assert ("pixel_loss" in values) == (state.step == 2)
    assert not torch.equal(last_fidelity_weight(state.network), fused)
    assert all(torch.equal(state.network.state_dict()[key], value) for key, value in frozen.items())


def test_fidelity_alone_leaves_everything_else_as_it_is(tiny: ModuleType) -> None:
    stage, state = started(tiny, trained="fidelity", code_steps=0, fidelity_every=1)
    before = {key: value.clone() for key, value in state.network.state_dict().items()}
    for state.step in range(3):
        values = stage.step(state, tiny.batch(torch.arange(1, 5)))
    assert values["pixel_loss"] > 0 and values["common_code_loss"] > 0, "losses against codes are reported"
    for key, value in state.network.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("fuse_convs_dict"), key
    for refused in ({"code_steps": 1, "fidelity_every": 1}, {"code_steps": 0, "fidelity_every": 2}):
        with pytest.raises(UsageError, match="would train nothing"):
            Stage3Config(trained="fidelity", **refused)  # type: ignore[arg-type]


def test_the_judged_picture_keeps_the_tones_that_inference_keeps(tiny: ModuleType) -> None:
    """With the window of a whole picture its mean is the input's, however wrong the generator's is."""
    seen: list[torch.Tensor] = []

    def perceptual(restored: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        seen.append(restored.detach())
        return tiny.smooth_l2(restored, wanted)

    batch = tiny.batch(torch.arange(1, 5))
    for tones in (0, 8):
        stage, state = started(tiny, {"tones": tones})
        stage.objective = replace(stage.objective, perceptual=perceptual)
        stage.step(state, batch)
    plain, toned = seen
    torch.testing.assert_close(toned, keep_tones(plain, batch.degraded, 8))
    assert not torch.allclose(toned, plain, atol=0.01)


def test_a_quality_loss_asks_for_wishes_on_steps_with_fidelity_only(tiny: ModuleType) -> None:
    config = Stage3Config(optimiser=tiny.RATE, first_steps=1, second_steps=0, code_steps=9, quality_weight=0.5)
    config = replace(config, dial_fraction=1.0, adversary=tiny.stage1_config().adversary)
    with pytest.raises(UsageError, match="no quality prior was given"):
        Stage3(config, perceptual=tiny.smooth_l2, teacher=tiny.network())
    with pytest.raises(UsageError, match="nothing would teach"):
        replace(config, quality_weight=0.0)
    prior = tiny.Sharpness()
    stage = Stage3(config, perceptual=tiny.smooth_l2, quality_prior=prior, teacher=tiny.network())
    state = stage.initial_state(tiny.network(), seed=1)
    asked: list[torch.Tensor] = []
    judged: list[torch.Tensor] = []
    state.network.score_embed.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    state.network.generator.register_forward_hook(lambda _, args, out: judged.append(out.detach()))
    batch = tiny.batch(torch.arange(1, 5))
    first = stage.step(state, batch)
    expected = (prior(to_unit_range(judged[0])) - asked[0]).abs().mean()
    torch.testing.assert_close(first["quality_loss"], 0.5 * expected)
    assert not torch.equal(asked[0], batch.quality) and first["common_code_loss"] == 0
    parts = ("pixel_loss", "perceptual_loss", "feature_loss", "common_code_loss", "hq_code_loss", "quality_loss")
    total = sum(first[name] for name in parts) + first["adversarial_weight"] * first["adversarial_loss"]
    torch.testing.assert_close(first["loss"], total)
    state.step = 1
    assert "quality_loss" not in stage.step(state, batch)
    assert torch.equal(asked[1], batch.quality)
