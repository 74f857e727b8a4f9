"""Stage 1: gradients of the balanced backward pass, gating of the HQ+ codebook, codebook upkeep."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from iqpir.errors import UsageError
from iqpir.losses import adversarial_weight, generator_loss, pixel_loss
from iqpir.networks.vector_quantizer import QuantiserConfig
from iqpir.stages.adversary import AdversaryConfig, PictureObjective, balanced_backward
from iqpir.stages.stage1 import Stage1
from iqpir.training.distributed import SINGLE
from iqpir.training.order import sample_at

OFF = AdversaryConfig(weight=0.0)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def published_gradients(tiny: ModuleType, critic: nn.Module) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The reference: two extra backward passes for the weight, then one of the whole sum."""
    network, batch = tiny.network(), tiny.batch(numbers(1, 2, 3, 4))
    found = network.reconstruct(batch.hq, batch.quality)
    reconstruction = pixel_loss(found.pictures, batch.hq) + tiny.smooth_l2(found.pictures, batch.hq)
    adversarial = generator_loss(critic(found.pictures))
    last = network.generator.last_weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    weight = adversarial_weight(norms[0], norms[1], 1.0, 0.8)
    (reconstruction + weight * adversarial + found.quantised.loss).backward()
    return {k: p.grad for k, p in network.named_parameters() if p.grad is not None}, weight


def test_one_shared_backward_gives_the_gradients_of_three(tiny: ModuleType) -> None:
    torch.manual_seed(5)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3)).requires_grad_(False)
    critic[2].weight.mul_(100)
    expected, weight = published_gradients(tiny, critic)
    network, batch = tiny.network(), tiny.batch(numbers(1, 2, 3, 4))
    found = network.reconstruct(batch.hq, batch.quality)
    losses = balanced_backward(
        found.pictures,
        batch.hq,
        found.quantised.loss,
        PictureObjective(pixel_weight=1.0, perceptual_weight=1.0, perceptual=tiny.smooth_l2),
        critic=critic,
        balance=network.generator.last_weight,
        config=AdversaryConfig(weight=0.8),
        distributed=SINGLE,
    )
    got = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
    assert expected.keys() == got.keys()
    assert 0 < weight < 0.8, "neither end of the clamp: the comparison means something"
    torch.testing.assert_close(losses.weight, weight)
    largest = max(value.norm() for value in expected.values())
    for key, value in expected.items():
        # A bias in front of a norm has no gradient but rounding: measured against the largest one too.
        assert (got[key] - value).norm() <= 1e-5 * value.norm() + 1e-6 * largest, key


def test_the_generator_step_leaves_no_gradient_in_the_discriminator(tiny: ModuleType) -> None:
    stage = Stage1(tiny.stage1_config(warmup_steps=0), perceptual=tiny.smooth_l2)
    state = stage.initial_state(tiny.network(), seed=1)
    before = {k: v.clone() for k, v in state.discriminator.state_dict().items()}
    values = stage.step(state, tiny.batch(numbers(1, 2)))
    assert "discriminator_loss" not in values
    assert values["adversarial_weight"] == 0
    assert all(torch.equal(v, before[k]) for k, v in state.discriminator.state_dict().items())
    state.step = 1
    values = stage.step(state, tiny.batch(numbers(1, 2)))
    assert values["adversarial_weight"] > 0
    assert values["discriminator_loss"] > 0
    assert any(not torch.equal(v, before[k]) for k, v in state.discriminator.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in state.discriminator.parameters())


def test_published_discriminator_start() -> None:
    config = AdversaryConfig()
    # Iterations are counted from 1 there, steps from 0 here: active for iteration > 30001.
    assert (config.active_at(30_000), config.active_at(30_001)) == (False, True)


def test_a_perceptual_weight_without_a_loss_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(UsageError, match="perceptual"):
        Stage1(tiny.stage1_config())


def test_warm_up_needs_codebooks_that_can_be_placed(tiny: ModuleType) -> None:
    with pytest.raises(UsageError, match="warmup_steps"):
        tiny.stage1_config(codebook_training="loss")


@pytest.mark.parametrize("training", ["loss", "ema"])
def test_samples_at_the_threshold_leave_the_hq_codebook_untouched(tiny: ModuleType, training: str) -> None:
    stage = Stage1(tiny.stage1_config(codebook_training=training, warmup_steps=0, adversary=OFF, perceptual_weight=0.0))
    state = stage.initial_state(tiny.network(), seed=1)
    batch = tiny.batch(numbers(1, 2, 3))
    at_threshold = replace(batch, quality=torch.tensor([0.5, 0.1, 0.0]))
    hq = state.network.quantize_aesthetic.embedding.weight
    common = state.network.quantize.embedding.weight
    before = hq.clone(), common.clone()
    values = stage.step(state, at_threshold)
    assert values["hq_codebook_loss"] == 0
    assert torch.equal(hq, before[0])
    assert not torch.equal(common, before[1])
    state.step = 1
    stage.step(state, replace(batch, quality=torch.tensor([0.51, 0.1, 0.0])))
    assert not torch.equal(hq, before[0])


def test_hq_loss_is_divided_by_the_batch_not_by_the_gated_samples(tiny: ModuleType) -> None:
    stage = Stage1(tiny.stage1_config(codebook_training="loss", warmup_steps=0, perceptual_weight=0.0, adversary=OFF))
    batch = tiny.batch(numbers(1, 1, 1, 1))
    values = []
    for quality in ([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]):
        state = stage.initial_state(tiny.network(), seed=1)
        values.append(stage.step(state, replace(batch, quality=torch.tensor(quality)))["hq_codebook_loss"])
    torch.testing.assert_close(values[1], values[0] / 4)


def test_warm_up_trains_without_codes_and_then_places_them_on_the_latents(tiny: ModuleType) -> None:
    stage = Stage1(tiny.stage1_config(warmup_steps=2, adversary=OFF, perceptual_weight=0.0))
    state = stage.initial_state(tiny.network(), seed=1)
    fresh = state.network.quantize.embedding.weight.clone()
    for state.step in range(2):
        values = stage.step(state, tiny.batch(numbers(1, 2, 3, 4)))
        assert "common_codebook_loss" not in values
        assert torch.equal(state.network.quantize.embedding.weight, fresh)
    assert stage.health(state).keys() == {"learning_rate"}
    batch = replace(tiny.batch(numbers(1, 2, 3, 4)), quality=torch.tensor([0.9, 0.8, 0.1, 0.2]))
    state.step = 2
    stage.step(state, batch)
    health = stage.health(state)
    # k-means on the very latents that are then quantised: every common code is used.
    assert health["common_usage"] == 1.0
    assert health["common_dead"] == 0.0
    assert health["hq_usage"] == 1.0
    assert 1 < health["common_perplexity"] <= 16
    assert torch.equal(state.ema.module.quantize.embedding.weight, state.network.quantize.embedding.weight), (
        "codebooks with an average of their own are copied, not averaged again"
    )


def test_health_counts_hq_codes_of_gated_samples_only(tiny: ModuleType) -> None:
    stage = Stage1(tiny.stage1_config(codebook_training="loss", warmup_steps=0, perceptual_weight=0.0, adversary=OFF))
    state = stage.initial_state(tiny.network(), seed=1)
    stage.step(state, replace(tiny.batch(numbers(1, 2)), quality=torch.tensor([0.9, 0.1])))
    assert state.code_counts["common"].sum() == 2 * 64
    assert state.code_counts["hq"].sum() == 64


@pytest.mark.parametrize(
    "changes",
    [{}, {"codebooks": "single", "alpha": 0.0}, {"fusion": "attention"}, {"residual_hq": True}],
    ids=["dual", "single", "attention", "residual"],
)
def test_a_gradient_reaches_every_parameter_of_the_autoencoder(tiny: ModuleType, changes: dict[str, object]) -> None:
    stage = Stage1(tiny.stage1_config(codebook_training="loss", warmup_steps=0, perceptual_weight=0.0, adversary=OFF))
    network = tiny.network(**changes)
    state = stage.initial_state(network, seed=1)
    seen: dict[str, float] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.__setitem__(name, float(p.grad.abs().max()))
        )
    stage.step(state, replace(tiny.batch(numbers(1, 2)), quality=torch.tensor([0.9, 0.8])))
    trained = set(network.autoencoder_state())
    assert {name for name, largest in seen.items() if largest > 0} == trained


def test_the_rotation_changes_what_reaches_the_encoder_and_nothing_else_of_a_step(tiny: ModuleType) -> None:
    def stepped(estimator: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        quantiser = QuantiserConfig(estimator=estimator)  # type: ignore[arg-type]
        config = tiny.stage1_config(
            codebook_training="loss", warmup_steps=0, perceptual_weight=0.0, adversary=OFF, quantiser=quantiser
        )
        stage, network = Stage1(config), tiny.network()
        state = stage.initial_state(network, seed=1)
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name: gradients.update({name: p.grad.clone()})
                )
        values = stage.step(state, tiny.batch(numbers(1, 2, 3, 4)))
        return {name: float(value) for name, value in values.items()}, gradients

    (copied, plain), (turned, rotated) = stepped("straight_through"), stepped("rotation")
    assert turned == pytest.approx(copied, rel=1e-4) and plain.keys() == rotated.keys()
    for name, gradient in plain.items():
        assert bool(rotated[name].isfinite().all()), name
        if not name.startswith("encoder."):
            torch.testing.assert_close(rotated[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    first = "encoder.blocks.0.weight"
    assert (rotated[first] - plain[first]).norm() > 0.05 * plain[first].norm()


@pytest.mark.parametrize("changes", [{"fusion": "attention"}, {"residual_hq": True}, {"codebooks": "single"}])
def test_variants_run_from_warm_up_to_discriminator(tiny: ModuleType, changes: dict[str, object]) -> None:
    stage = Stage1(tiny.stage1_config(warmup_steps=1), perceptual=tiny.smooth_l2)
    state = stage.initial_state(tiny.network(**changes), seed=1)
    for state.step in range(4):
        values = stage.step(state, tiny.batch(numbers(1, 2, 3, 4)))
        assert all(value.ndim == 0 and not value.requires_grad for value in values.values())
        assert all(value.isfinite() for value in values.values())
    assert "discriminator_loss" in values


@pytest.mark.slow
def test_stage_1_learns_to_reconstruct(tiny: ModuleType) -> None:
    stage = Stage1(tiny.stage1_config(warmup_steps=40, perceptual_weight=0.0, adversary=OFF, ema_decay=0.9))
    state = stage.initial_state(tiny.network(), seed=1)
    losses = []
    for state.step in range(160):
        index = torch.tensor([sample_at(state.step * 8 + slot, 16, 3)[1] for slot in range(8)])
        losses.append(stage.step(state, tiny.batch(index))["pixel_loss"].item())
    assert sum(losses[-8:]) / 8 < 0.4 * losses[0]
    assert stage.health(state)["common_usage"] > 0.8
