"""The small parts: blocks, conditioning, Transformer layer, fidelity, discriminator."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from iqpir.errors import UsageError
from iqpir.networks.blocks import (
    AttentionBlock,
    Downsample,
    FusionAttention,
    ResidualBlock,
    Upsample,
    group_norm,
)
from iqpir.networks.code_transformer import CodeTransformerLayer, deinterleave
from iqpir.networks.conditioning import as_scores, consensus, quality_bin, quality_embedding
from iqpir.networks.discriminator import Discriminator, DiscriminatorConfig
from iqpir.networks.fidelity import FuseBlock, adaptive_instance_norm, keep_tones


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(4)


# --- blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "groups"), [(512, 32), (64, 32), (48, 16), (20, 4), (7, 1)])
def test_group_norm_takes_as_many_groups_as_fit(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert (norm.num_groups, norm.eps) == (groups, 1e-6)


def test_downsampling_pads_right_and_bottom_alone() -> None:
    block = Downsample(1)
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    with torch.no_grad():
        block.conv.weight[0, 0, 0, 0] = 1.0
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    assert block(picture).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


def test_upsampling_repeats_before_it_convolves() -> None:
    block = Upsample(1)
    nn.init.zeros_(block.conv.bias)
    nn.init.zeros_(block.conv.weight)
    with torch.no_grad():
        block.conv.weight[0, 0, 1, 1] = 1.0
    assert block(torch.tensor([[[[1.0, 2.0]]]])).flatten().tolist() == [1.0, 1.0, 2.0, 2.0] * 2


def test_a_residual_block_projects_its_shortcut_only_where_the_width_changes() -> None:
    assert ResidualBlock(32, 32).conv_out is None
    assert ResidualBlock(32, 64)(torch.randn(1, 32, 4, 4)).shape == (1, 64, 4, 4)


def test_attention_equals_its_formula() -> None:
    block, features = AttentionBlock(64), torch.randn(2, 64, 3, 5)
    normed = block.norm(features)
    query, key, value = (layer(normed).flatten(2) for layer in (block.q, block.k, block.v))
    weights = torch.softmax(query.transpose(1, 2) @ key * 64**-0.5, dim=2)
    attended = (value @ weights.transpose(1, 2)).view_as(features)
    torch.testing.assert_close(block(features), features + block.proj_out(attended), atol=1e-5, rtol=1e-4)


def test_fusion_attention_reads_the_hq_code_of_gated_samples_alone() -> None:
    block = FusionAttention(64)
    common, hq = torch.randn(2, 64, 4, 4), torch.randn(2, 64, 4, 4)
    gate = torch.tensor([True, False])
    before, after = block(common, hq, gate), block(common, hq + torch.randn_like(hq), gate)
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0], after[0])


# --- conditioning -------------------------------------------------------------------------


def test_bins_hold_tenths_and_ends_are_clamped() -> None:
    quality = torch.tensor([-0.01, 0.0, 0.0999, 0.1, 0.3, 0.7, 0.95, 0.999, 1.0, 1.7])
    assert quality_bin(quality, 10).tolist() == [0, 0, 0, 1, 3, 7, 9, 9, 9, 9]
    assert quality_bin(quality.bfloat16()[3:4], 10).tolist() == [1]
    assert quality_bin(torch.tensor([0.66, 0.91]), 20).tolist() == [13, 18]


def test_a_missing_quality_is_not_taken_for_the_lowest() -> None:
    with pytest.raises(IndexError):
        quality_embedding((10,), 4, 2)(torch.tensor([float("nan")]))


def test_several_embeddings_are_summed() -> None:
    embedding = quality_embedding((20, 10), 4, 2, deviation=1.0)
    maps = embedding(torch.tensor([[0.5, 0.9]]))
    weights = [embedding.get_parameter("0.weight")[10], embedding.get_parameter("1.weight")[9]]
    torch.testing.assert_close(maps[0], (weights[0] + weights[1]).view(4, 2, 2))


def test_additive_embeddings_start_at_zero() -> None:
    assert not quality_embedding((10,), 4, 2).get_parameter("weight").any()


def test_scores_are_shared_or_one_each() -> None:
    assert as_scores(torch.tensor([0.5]), 3).tolist() == [[0.5, 0.5, 0.5]]
    assert consensus(torch.tensor([[0.25, 0.75]])).tolist() == [0.5]
    for misshapen in (torch.zeros(2, 2), torch.tensor(0.5), torch.zeros(2, 3, 1)):
        with pytest.raises(UsageError, match="takes 3 score"):
            as_scores(misshapen, 3)


# --- Transformer --------------------------------------------------------------------------


def test_even_units_are_hq_codes_and_odd_ones_common_codes() -> None:
    common, hq = deinterleave(torch.arange(8.0).expand(2, 5, 8))
    assert common[1, 4].tolist() == [1.0, 3.0, 5.0, 7.0]
    assert hq[1, 4].tolist() == [0.0, 2.0, 4.0, 6.0]


def test_the_position_is_in_queries_and_keys_and_never_in_values() -> None:
    layer = CodeTransformerLayer(16, 2, modulated=False)
    tokens, position = torch.randn(2, 4, 16), torch.randn(4, 16)
    normed = layer.norm1(tokens)
    weights, biases = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
    query, key, value = (
        functional.linear(source, weights[part * 16 : part * 16 + 16], biases[part * 16 : part * 16 + 16])
        .view(2, 4, 2, 8)
        .transpose(1, 2)
        for part, source in enumerate([normed + position, normed + position, normed])
    )
    attended = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(8), dim=-1) @ value
    expected = tokens + layer.self_attn.out_proj(attended.transpose(1, 2).flatten(2))
    expected = expected + layer.linear2(functional.gelu(layer.linear1(layer.norm2(expected))))
    torch.testing.assert_close(layer(tokens, position), expected, atol=1e-5, rtol=1e-4)


def test_a_fresh_modulated_layer_passes_tokens_unchanged_and_then_learns() -> None:
    layer = CodeTransformerLayer(16, 2, modulated=True)
    tokens, position, condition = torch.randn(1, 4, 16), torch.randn(4, 16), torch.randn(1, 32, 2, 2)
    assert torch.equal(layer(tokens, position, condition), tokens)
    layer(tokens, position, condition).square().sum().backward()
    modulation = layer.get_parameter("adaLN_modulation.1.weight")
    assert modulation.grad is not None
    gates = [slice(32, 48), slice(80, 96)]
    assert all(modulation.grad[gate].abs().max() > 0 for gate in gates)


# --- fidelity -----------------------------------------------------------------------------


def test_instance_norm_takes_over_mean_and_unbiased_deviation() -> None:
    content, style = torch.randn(2, 3, 4, 4) * 5 + 2, torch.randn(2, 3, 4, 4)
    result = adaptive_instance_norm(content, style)
    torch.testing.assert_close(result.mean((2, 3)), style.mean((2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.std((2, 3)), style.std((2, 3)), atol=1e-3, rtol=1e-3)


def test_instance_norm_of_a_faint_channel_equals_its_formula() -> None:
    content, style = torch.randn(1, 3, 4, 4) * 3e-3, torch.randn(1, 3, 4, 4)
    spread = (content.var((2, 3), correction=1, keepdim=True) + 1e-5).sqrt()
    centred = (content - content.mean((2, 3), keepdim=True)) / spread
    wanted = (style.var((2, 3), correction=1, keepdim=True) + 1e-5).sqrt()
    expected = centred * wanted + style.mean((2, 3), keepdim=True)
    torch.testing.assert_close(adaptive_instance_norm(content, style), expected, atol=1e-5, rtol=1e-4)


def test_instance_norm_of_a_constant_channel_is_finite() -> None:
    constant = torch.ones(1, 2, 4, 4)
    assert adaptive_instance_norm(constant, torch.randn(1, 2, 4, 4)).isfinite().all()


def test_the_correction_grows_with_fidelity() -> None:
    block = FuseBlock(32)
    decoded, encoded = torch.randn(1, 32, 4, 4), torch.randn(1, 32, 4, 4)
    half, whole = (block(decoded, encoded, weight) - decoded for weight in (0.5, 1.0))
    torch.testing.assert_close(2 * half, whole)


# --- discriminator ------------------------------------------------------------------------


def test_the_published_discriminator_gives_a_map_of_30() -> None:
    with torch.device("meta"):
        assert Discriminator(DiscriminatorConfig())(torch.empty(1, 3, 512, 512)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize(("side", "layers"), [(512, 4), (64, 4), (47, 3), (32, 3), (16, 2), (6, 1)])
def test_layers_follow_the_picture(side: int, layers: int) -> None:
    config = DiscriminatorConfig.for_picture(side, norm="group")
    assert config.layers == layers
    judgements = Discriminator(config)(torch.randn(1, 3, side, side))
    assert judgements.shape[:2] == (1, 1)
    assert judgements.numel() >= 1


def test_pictures_that_are_too_small_are_refused() -> None:
    with pytest.raises(UsageError, match="too small for 4 layers"):
        Discriminator(DiscriminatorConfig(base_channels=8))(torch.zeros(1, 3, 47, 64))
    with pytest.raises(UsageError, match="Use 6 or more"):
        DiscriminatorConfig.for_picture(5)


def test_group_norm_judges_each_picture_by_itself() -> None:
    network = Discriminator(DiscriminatorConfig(base_channels=8, layers=3, norm="group")).train()
    pictures = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network(pictures)[:1], network(pictures[:1]), atol=1e-5, rtol=1e-4)
    assert not list(network.buffers())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_gradient_reaches_every_parameter_of_the_discriminator(norm: str) -> None:
    network = Discriminator(DiscriminatorConfig.for_picture(32, norm="batch" if norm == "batch" else "group"))
    functional.relu(1 - network(torch.randn(4, 3, 32, 32))).mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_tones_are_those_of_the_input_and_detail_is_the_restored_ones() -> None:
    restored, pictures = torch.rand(2, 2, 3, 24, 24)
    assert keep_tones(restored, pictures, 0) is restored
    shifted = keep_tones(restored, restored + 0.25, 8)
    torch.testing.assert_close(shifted, restored + 0.25)
    checks = torch.tensor([1.0, -1.0]).repeat(12).view(1, 1, 1, 24) * torch.ones(1, 3, 24, 1)
    detailed = keep_tones(checks, torch.full_like(checks, 0.5), 8)
    assert (detailed[..., 4:-4, 4:-4].mean() - 0.5).abs() < 0.01
    assert detailed.std() > 0.8, "alternating pixels are no tone"
