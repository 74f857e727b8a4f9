"""The same weights give the same pictures as an independent implementation of CodeFormer."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iqpir
from iqpir.config import PRESETS
from iqpir.networks.autoencoder import Encoder, Generator
from iqpir.networks.code_transformer import CodeTransformerLayer
from iqpir.networks.fidelity import FuseBlock, adaptive_instance_norm
from pipeline.torchvision_ops import ensure_torchvision_operators


@pytest.fixture(scope="module")
def peer() -> Any:
    """spandrel's module; it imports torchvision."""
    ensure_torchvision_operators()
    return pytest.importorskip("spandrel_extra_arches.architectures.CodeFormer.__arch.codeformer")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(6)


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def alike_in_weights(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("name", ["tiny32", "tiny64"])
@torch.no_grad()
def test_encoder_and_generator_compute_alike(peer: Any, name: str) -> None:
    # The peer's group norm always has 32 groups.
    config = dataclasses.replace(PRESETS[name], base_channels=32, attention_sizes=(16,))
    side, multipliers = config.image_size, list(config.channel_multipliers)
    encoder, their_encoder = alike_in_weights(
        Encoder(config),
        peer.Encoder(3, 32, 64, multipliers, config.res_blocks, side, list(config.attention_sizes)),
    )
    pictures = torch.rand(2, 3, side, side) * 2 - 1
    latent = encoder(pictures)[0]
    assert_alike(latent, their_encoder(pictures))
    generator, their_generator = alike_in_weights(
        Generator(config),
        peer.Generator(32, multipliers, config.res_blocks, side, list(config.attention_sizes), 64),
    )
    assert_alike(generator(latent), their_generator(latent))


@torch.no_grad()
def test_transformer_layer_fusion_and_instance_norm_compute_alike(peer: Any) -> None:
    layer, their_layer = alike_in_weights(
        CodeTransformerLayer(64, 4, modulated=False), peer.TransformerSALayer(64, 4, 128)
    )
    tokens, position = torch.randn(2, 16, 64), torch.randn(16, 64)
    expected = their_layer(tokens.transpose(0, 1), query_pos=position[:, None])
    assert_alike(layer(tokens, position), expected.transpose(0, 1))
    fuse, their_fuse = alike_in_weights(FuseBlock(64), peer.Fuse_sft_block(64, 64))
    decoded, encoded = torch.randn(2, 2, 64, 8, 8)
    assert_alike(fuse(decoded, encoded, 0.7), their_fuse(encoded, decoded, 0.7))
    expected = peer.adaptive_instance_normalization(decoded, 3 * encoded + 1)
    assert_alike(adaptive_instance_norm(decoded, 3 * encoded + 1), expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.no_grad()
def test_a_picture_of_512_is_restored_alike(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = peer.CodeFormer().eval()
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    # What starts at (almost) zero is made visible.
    state["position_emb"].normal_(std=0.5)
    state["quantize.embedding.weight"].normal_(std=0.5)
    theirs.load_state_dict(state)
    ours = iqpir.build("codeformer512").eval()
    ours.load_state_dict(state)
    picture = torch.rand(1, 3, 512, 512) * 2 - 1

    def compare(*, adain: bool) -> None:
        for fidelity in (0.0, 0.5, 1.0):
            expected = theirs(picture, weight=fidelity)[0]
            assert_alike(ours(picture, None, fidelity, adain=adain), expected)

    assert_alike(ours.predict(picture, None).logits, theirs(picture, weight=0.0)[1])
    compare(adain=True)
    # The peer always normalises; without that step it is the network without AdaIN.
    monkeypatch.setattr(peer, "adaptive_instance_normalization", lambda content, _: content)
    compare(adain=False)
