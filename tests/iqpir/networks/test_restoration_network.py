"""What the restoration network promises, in every variant."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import iqpir
from iqpir.config import PRESETS, NetworkConfig
from iqpir.errors import UsageError
from iqpir.networks.fidelity import keep_tones
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.networks.vector_quantizer import straight_through

TINY = NetworkConfig(
    image_size=32,
    base_channels=32,
    channel_multipliers=(1, 2, 4),
    res_blocks=1,
    attention_sizes=(8,),
    latent_channels=64,
    codebook_size=256,
    transformer_width=128,
    transformer_heads=4,
    transformer_layers=3,
    connect_sizes=(16,),
)
"""Three levels and attention: all that a large network has, at 32 pixels."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dual-add": {},
    "single": {"codebooks": "single", "conditioning": "none", "alpha": 0.0},
    "single-add": {"codebooks": "single"},
    "dual-none": {"conditioning": "none"},
    "dual-adaln": {"conditioning": "adaln"},
    "several-scores": {"quality_bins": (20, 20, 10)},
    "several-scores-adaln": {"quality_bins": (20, 20), "conditioning": "adaln"},
    "attention": {"fusion": "attention"},
    "residual": {"residual_hq": True},
    "paper-gate": {"hq_gate": "paper"},
}


def network_of(**changes: Any) -> RestorationNetwork:
    """A seeded tiny network whose starting zeros are replaced, so that nothing is equal by accident."""
    torch.manual_seed(0)
    network = iqpir.build(dataclasses.replace(TINY, **changes))
    for name, parameter in network.named_parameters():
        if name.startswith(("position_emb", "score_embed")) or "adaLN" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        if name.startswith("quantize"):
            torch.nn.init.normal_(parameter, std=0.5)
    return network


def pictures_of(config: NetworkConfig = TINY, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, config.image_size, config.image_size, generator=generator) * 2 - 1


@pytest.fixture(params=VARIANTS, ids=str)
def network(request: pytest.FixtureRequest) -> RestorationNetwork:
    return network_of(**VARIANTS[request.param])


QUALITY = torch.tensor([0.95, 0.2])


# --- all presets, all variants ----------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny32", "tiny64"])
def test_small_presets_restore(name: str) -> None:
    network = iqpir.build(name).eval()
    pictures = pictures_of(network.config)
    with torch.no_grad():
        restored = network(pictures, QUALITY, fidelity=0.5)
    assert restored.shape == pictures.shape
    assert restored.isfinite().all()


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_consistent_shapes(name: str) -> None:
    network = iqpir.build(name, device="meta")
    side = network.config.image_size
    pictures = torch.empty(2, 3, side, side, device="meta")
    quality = torch.empty(2, device="meta")
    assert network(pictures, quality, 1.0).shape == pictures.shape
    latent = network.encode(pictures)
    assert latent.shape[2:] == (network.config.latent_size,) * 2


def test_every_variant_restores(network: RestorationNetwork) -> None:
    pictures = pictures_of()
    with torch.no_grad():
        for fidelity in (0.0, 1.0):
            restored = network(pictures, QUALITY, fidelity)
            assert restored.shape == pictures.shape
            assert restored.isfinite().all()


def test_a_sample_does_not_depend_on_its_batch(network: RestorationNetwork) -> None:
    pictures = pictures_of()
    with torch.no_grad():
        together = network(pictures, QUALITY, 0.5)
        alone = network(pictures[:1], QUALITY[:1], 0.5)
        rebuilt = network.reconstruct(pictures, QUALITY).pictures
        rebuilt_alone = network.reconstruct(pictures[1:], QUALITY[1:]).pictures
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rebuilt[1:], rebuilt_alone, atol=1e-4, rtol=1e-4)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"takes \[B, 3, 32, 32\]"):
        network_of().encode(torch.zeros(1, 3, 64, 64))


# --- gradients --------------------------------------------------------------------------

# softmax over keys does not change when all keys are shifted together: a key's bias has no effect.
WITHOUT_EFFECT = (".k.bias",)


def silent_parameters(network: RestorationNetwork, parts: tuple[str, ...]) -> list[str]:
    """Parameters in ``parts`` that should have a gradient and have none."""
    return [
        name
        for name, parameter in network.named_parameters()
        if name.split(".")[0] in parts
        and not name.endswith(WITHOUT_EFFECT)
        and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    ]


def test_stage_1_reaches_every_parameter_of_the_autoencoder(network: RestorationNetwork) -> None:
    pictures = pictures_of()
    rebuilt = network.reconstruct(pictures, QUALITY)
    (functional.l1_loss(rebuilt.pictures, pictures) + rebuilt.quantised.loss).backward()
    parts = ("encoder", "generator", "quantize", "quantize_aesthetic", "attention")
    assert silent_parameters(network, parts) == []


def code_loss(network: RestorationNetwork, pictures: Tensor) -> Tensor:
    """Stage 2's cross entropy over both books."""
    targets = network.encode_codes(pictures).flatten(2)
    prediction = network.predict(pictures, torch.tensor([0.9, 0.9]))
    loss = functional.cross_entropy(prediction.common.transpose(1, 2), targets[:, 0])
    if network.books == 2:
        loss = loss + functional.cross_entropy(prediction.hq.transpose(1, 2), targets[:, 1])
    return loss


def test_stage_2_reaches_every_parameter_of_the_predictor(network: RestorationNetwork) -> None:
    code_loss(network, pictures_of()).backward()
    parts = ("encoder", "position_emb", "feat_emb", "score_embed", "ft_layers", "idx_pred_layer")
    assert silent_parameters(network, parts) == []


def test_fidelity_reaches_every_fidelity_parameter(network: RestorationNetwork) -> None:
    network(pictures_of(), QUALITY, fidelity=0.7).square().mean().backward()
    assert silent_parameters(network, ("fuse_convs_dict",)) == []


@pytest.mark.parametrize("conditioning", ["add", "adaln"])
def test_fresh_networks_learn_their_condition(conditioning: str) -> None:
    """Zero starts must not be stuck: after two steps every parameter has had a gradient."""
    torch.manual_seed(0)
    network = iqpir.build(dataclasses.replace(TINY, conditioning=conditioning, transformer_layers=1))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        code_loss(network, pictures_of()).backward()
        optimiser.step()
    assert silent_parameters(network, ("score_embed", "ft_layers", "position_emb")) == []


def test_soft_codes_give_the_transformer_the_decoders_gradient(network: RestorationNetwork) -> None:
    prediction = network.predict(pictures_of(), QUALITY)
    soft = network.soft_lookup(prediction.logits, 1.0, QUALITY)
    hard = network.lookup(prediction.codes, QUALITY)
    latent = straight_through(hard, soft)
    torch.testing.assert_close(latent, hard)
    network.decode(latent).square().mean().backward()
    assert silent_parameters(network, ("feat_emb", "ft_layers", "idx_pred_layer")) == []


def test_cold_soft_codes_are_the_hard_codes(network: RestorationNetwork) -> None:
    with torch.no_grad():
        prediction = network.predict(pictures_of(), QUALITY)
        sharp = network.soft_lookup(prediction.logits * 1e6, 1e-3, QUALITY)
        torch.testing.assert_close(sharp, network.lookup(prediction.codes, QUALITY), atol=1e-4, rtol=1e-4)


# --- stage 1: gate ----------------------------------------------------------------------


def test_only_samples_above_the_threshold_use_the_hq_codebook() -> None:
    network = network_of(hq_threshold=0.5)
    quality = torch.tensor([0.9, 0.5, 0.2])
    latent = network.encode(pictures_of(count=3))
    quantised = network.quantise(latent, quality)
    common = network.quantize.lookup(quantised.codes[:, 0])
    assert quantised.gate.tolist() == [True, False, False]
    torch.testing.assert_close(quantised.latent[1:], common[1:])
    expected = common[0] + 0.8 * network.quantize_aesthetic.lookup(quantised.codes[:, 1])[0]
    torch.testing.assert_close(quantised.latent[0], expected)
    assert quantised.hq_loss is not None
    assert (quantised.hq_loss[1:] == 0).all()
    assert quantised.hq_loss[0] > 0


def test_an_ungated_sample_gives_the_hq_codebook_no_gradient() -> None:
    network = network_of(hq_threshold=0.5)
    network.reconstruct(pictures_of(), torch.tensor([0.1, 0.5])).quantised.loss.backward()
    assert not network.quantize_aesthetic.embedding.weight.grad.any()
    assert network.quantize.embedding.weight.grad.any()


def test_the_latent_gets_one_plus_alpha_of_the_decoders_gradient() -> None:
    network = network_of(hq_threshold=0.5, alpha=0.8)
    latent = network.encode(pictures_of()).detach().requires_grad_()
    network.quantise(latent, torch.tensor([0.9, 0.1])).latent.sum().backward()
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad[0], torch.full_like(latent.grad[0], 1.8))
    torch.testing.assert_close(latent.grad[1], torch.full_like(latent.grad[1], 1.0))


def test_the_input_of_the_quantiser_is_left_alone(network: RestorationNetwork) -> None:
    latent = network.encode(pictures_of()).detach()
    before = latent.clone()
    network.quantise(latent, QUALITY)
    assert torch.equal(latent, before)


def test_the_residual_book_quantises_what_the_common_code_leaves() -> None:
    network = network_of(residual_hq=True)
    latent = network.encode(pictures_of()).detach()
    codes = network.quantise(latent, QUALITY).codes
    rest = latent - network.quantize.lookup(codes[:, 0])
    assert torch.equal(network.quantize_aesthetic.assign(rest), codes[:, 1])


def test_codes_of_stage_1_and_of_the_code_writer_agree(network: RestorationNetwork) -> None:
    pictures = pictures_of()
    codes = network.reconstruct(pictures, QUALITY).quantised.codes
    assert torch.equal(network.encode_codes(pictures), codes)
    assert codes.shape == (2, network.books, 8, 8)


# --- stage 2 and inference --------------------------------------------------------------


def test_the_gate_of_the_paper_follows_the_wanted_quality() -> None:
    quality = torch.tensor([0.9, 0.7])
    codes = torch.zeros(2, 2, 8, 8, dtype=torch.int64)
    gated = network_of(hq_gate="paper", hq_threshold=0.7)
    always = network_of(hq_gate="code", hq_threshold=0.7)
    common = gated.quantize.lookup(codes[:, 0])
    torch.testing.assert_close(gated.lookup(codes, quality)[1], common[1])
    torch.testing.assert_close(gated.lookup(codes, quality)[0], always.lookup(codes)[0])
    assert not torch.equal(always.lookup(codes)[1], common[1])
    with pytest.raises(UsageError, match="needs a quality"):
        gated.lookup(codes)


def test_head_units_are_interleaved_hq_first() -> None:
    network = network_of()
    with torch.no_grad():
        network.idx_pred_layer[0].weight.zero_()
        network.idx_pred_layer[0].bias.fill_(1.0)
        network.idx_pred_layer[1].weight.zero_()
        network.idx_pred_layer[1].weight[2 * 7 + 0] = 1.0
        network.idx_pred_layer[1].weight[2 * 3 + 1] = 1.0
        prediction = network.predict(pictures_of(), QUALITY)
    assert (prediction.hq.argmax(-1) == 7).all()
    assert (prediction.common.argmax(-1) == 3).all()
    assert (prediction.codes[:, 0] == 3).all()
    assert (prediction.codes[:, 1] == 7).all()


def test_a_single_batch_works_like_any_other() -> None:
    prediction = network_of().predict(pictures_of(count=1), torch.tensor([0.9]))
    assert prediction.common.shape == (1, 64, 256)
    assert prediction.codes.shape == (1, 2, 8, 8)


def test_conditioning_leaves_the_raw_latent_alone() -> None:
    network = network_of()
    pictures = pictures_of()
    with torch.no_grad():
        prediction = network.predict(pictures, QUALITY)
        torch.testing.assert_close(prediction.raw_latent, network.encode(pictures))
        torch.testing.assert_close(prediction.latent, prediction.raw_latent + network.score_embed(QUALITY))
    assert not torch.equal(prediction.latent, prediction.raw_latent)


@pytest.mark.parametrize("conditioning", ["add", "adaln"])
def test_quality_changes_the_picture_and_extreme_values_work(conditioning: str) -> None:
    network = network_of(conditioning=conditioning)
    pictures = pictures_of(count=1).expand(4, -1, -1, -1)
    with torch.no_grad():
        logits = network.predict(pictures, torch.tensor([1.0, 0.95, -0.01, 0.0])).logits
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[3])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_a_fresh_network_is_not_moved_by_its_condition() -> None:
    for conditioning in ("add", "adaln"):
        torch.manual_seed(0)
        network = iqpir.build(dataclasses.replace(TINY, conditioning=conditioning))
        pictures = pictures_of(count=1).expand(2, -1, -1, -1)
        with torch.no_grad():
            logits = network.predict(pictures, torch.tensor([0.1, 0.9])).logits
        torch.testing.assert_close(logits[0], logits[1])


def test_several_scores_condition_one_by_one_and_one_score_stands_for_all() -> None:
    network = network_of(quality_bins=(20, 20, 10))
    pictures = pictures_of(count=1).expand(2, -1, -1, -1)
    with torch.no_grad():
        first, second = network.predict(pictures, torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.1, 0.9]])).logits
        shared = network.predict(pictures[:1], torch.tensor([0.9])).logits[0]
    torch.testing.assert_close(first, shared)
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(UsageError, match=r"takes 3 score"):
        network.predict(pictures, torch.zeros(2, 2))


def test_a_quality_is_asked_for_only_where_it_is_used() -> None:
    pictures = pictures_of()
    with pytest.raises(UsageError, match="needs a quality"):
        network_of()(pictures, None)
    unconditioned = network_of(conditioning="none", codebooks="single", alpha=0.0)
    assert unconditioned(pictures, None).shape == pictures.shape


# --- fidelity ---------------------------------------------------------------------------


def restore_twice(network: RestorationNetwork, change: Callable[[], None], fidelity: float) -> tuple[Tensor, Tensor]:
    pictures = pictures_of()
    with torch.no_grad():
        before = network(pictures, QUALITY, fidelity)
        change()
        return before, network(pictures, QUALITY, fidelity)


def test_without_fidelity_the_output_does_not_depend_on_the_fidelity_modules() -> None:
    network = network_of()

    def spoil() -> None:
        for parameter in network.fuse_convs_dict.parameters():
            parameter.fill_(float("nan"))

    before, after = restore_twice(network, spoil, fidelity=0.0)
    assert torch.equal(before, after)


def test_with_fidelity_the_output_depends_on_the_fidelity_modules() -> None:
    network = network_of()

    def shift() -> None:
        for parameter in network.fuse_convs_dict.parameters():
            parameter.mul_(1.5)

    before, after = restore_twice(network, shift, fidelity=0.5)
    assert not torch.allclose(before, after)


def test_fidelity_gives_the_encoder_features_no_gradient() -> None:
    network = network_of()
    prediction = network.predict(pictures_of(), QUALITY, taps=True)
    taps = {size: tap.detach().requires_grad_() for size, tap in prediction.taps.items()}
    network.decode(prediction.latent, taps, 1.0).square().sum().backward()
    assert list(taps) == [16]
    assert all(tap.grad is None for tap in taps.values())
    with pytest.raises(ValueError, match="taps=True"):
        network.decode(prediction.latent.detach(), None, 1.0)


def test_fidelity_needs_fidelity_modules_and_is_not_negative() -> None:
    with pytest.raises(UsageError, match="connect_sizes"):
        network_of(connect_sizes=())(pictures_of(), QUALITY, 0.5)
    with pytest.raises(UsageError, match=r"fidelity -0\.1"):
        network_of()(pictures_of(), QUALITY, -0.1)


def test_without_adain_the_decoder_sees_codebook_rows_alone() -> None:
    network = network_of()
    pictures = pictures_of()
    with torch.no_grad():
        codes = network.predict(pictures, QUALITY).codes
        expected = network.decode(network.lookup(codes))
        torch.testing.assert_close(network(pictures, QUALITY, adain=False), expected)
        assert not torch.allclose(network(pictures, QUALITY, adain=True), expected, atol=1e-3)


# --- precision, weights -----------------------------------------------------------------


def test_codes_under_autocast_are_chosen_in_float32() -> None:
    network = network_of()
    latent = network.encode(pictures_of()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantised = network.quantise(latent, QUALITY)
    assert quantised.latent.dtype == torch.float32
    assert quantised.loss.dtype == torch.float32
    assert torch.equal(quantised.codes, network.quantise(latent, QUALITY).codes)


def test_the_autoencoder_part_moves_between_networks() -> None:
    source, target = network_of(), network_of(conditioning="none")
    before = target.idx_pred_layer[1].weight.clone()
    torch.nn.init.normal_(source.encoder.blocks[0].weight)
    target.load_autoencoder(source.state_dict())
    for key, value in source.autoencoder_state().items():
        assert torch.equal(target.state_dict()[key], value), key
    assert torch.equal(target.idx_pred_layer[1].weight, before)
    with pytest.raises(UsageError, match="quantize_aesthetic"):
        network_of(codebooks="single").load_autoencoder(source.state_dict())
    with pytest.raises(UsageError, match="not of this autoencoder"):
        network_of(latent_channels=32).load_autoencoder(source.state_dict())


def test_kept_tones_change_the_restored_picture_alone_and_old_configurations_stay_what_they_are() -> None:
    torch.manual_seed(0)
    plain = RestorationNetwork(TINY)
    toned = RestorationNetwork(dataclasses.replace(TINY, tones=8))
    toned.load_state_dict(plain.state_dict())
    pictures, quality = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected = keep_tones(plain(pictures, quality), pictures, 8)
        torch.testing.assert_close(toned(pictures, quality), expected)
        torch.testing.assert_close(
            toned.reconstruct(pictures, quality).pictures, plain.reconstruct(pictures, quality).pictures
        )
    assert "tones" not in TINY.to_dict()
    assert NetworkConfig.from_dict(toned.config.to_dict()) == toned.config
    with pytest.raises(UsageError, match="tones 32"):
        dataclasses.replace(TINY, tones=32)
