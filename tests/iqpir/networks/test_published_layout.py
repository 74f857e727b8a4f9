"""The state dicts have the keys, shapes, types and order of the published checkpoints."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import iqpir
from iqpir.config import PRESETS
from iqpir.networks.discriminator import Discriminator, DiscriminatorConfig


def layout_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the lines "key<tab>shape<tab>dtype" in the order of the state dict."""
    lines = (f"{key}\t{tuple(value.shape)}\t{str(value.dtype)[6:]}" for key, value in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "entries", "digest"),
    [
        ("iqpir512", 517, "84f58b7e75ffb2702ee777ddd94320e91c87bfd1aa3c6f6f80e3d05750bde309"),
        ("codeformer512", 515, "2c6b643744458fb2054a3dfc528e6b6468d9b153db604686ea1be138446f9b3b"),
    ],
)
def test_a_network_has_the_published_layout(name: str, entries: int, digest: str) -> None:
    state = iqpir.build(name, device="meta").state_dict()
    assert len(state) == entries
    assert layout_digest(state) == digest


def test_the_discriminator_has_the_published_layout() -> None:
    with torch.device("meta"):
        network = Discriminator(DiscriminatorConfig())
    assert parameters(network) == 6_960_961
    assert layout_digest(network.state_dict()) == "6ac9fb40ba1fe6859fe1084aed6b3fdf77831bc1ee8c8107e198e9dcdf9fc52f"


def test_spot_keys_of_each_part() -> None:
    state = iqpir.build("iqpir512", device="meta").state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert next(iter(shapes)) == "position_emb"
    assert shapes["encoder.blocks.17.q.weight"] == (512, 512, 1, 1)
    assert shapes["quantize_aesthetic.embedding.weight"] == (1024, 256)
    assert shapes["score_embed.weight"] == (10, 65536)
    assert shapes["ft_layers.8.self_attn.in_proj_weight"] == (1536, 512)
    assert shapes["idx_pred_layer.1.weight"] == (2048, 512)
    assert shapes["fuse_convs_dict.256.shift.2.bias"] == (128,)
    assert list(shapes)[-1] == "fuse_convs_dict.256.shift.2.bias"


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, 95_554_499),
        ({"codebooks": "single"}, 94_768_067),
        ({"codebooks": "single", "conditioning": "none"}, 94_112_707),
        ({"conditioning": "none"}, 94_899_139),
        ({"conditioning": "adaln"}, 102_971_331),
        ({"quality_bins": (20, 20, 20, 20)}, 100_142_019),
        ({"connect_sizes": (32, 64, 128)}, 94_487_875),
        ({"fusion": "attention"}, 95_554_499 + 264_192),
    ],
)
def test_parameter_totals_of_the_variants(changes: dict[str, Any], total: int) -> None:
    config = dataclasses.replace(PRESETS["iqpir512"], **changes)
    assert parameters(iqpir.build(config, device="meta")) == total


@pytest.mark.parametrize(("name", "total"), [("codeformer512", 63_740_099), ("iqpir512", 64_002_243)])
def test_totals_of_the_autoencoder(name: str, total: int) -> None:
    state = iqpir.build(name, device="meta").autoencoder_state()
    assert sum(value.numel() for value in state.values()) == total


def test_keys_of_the_variants() -> None:
    several = dataclasses.replace(PRESETS["tiny32"], quality_bins=(20, 10), fusion="attention")
    state = iqpir.build(several, device="meta").state_dict()
    assert state["score_embed.1.weight"].shape == (10, 64 * 16 * 16)
    assert next(key for key in state if key.startswith("attention.")) == "attention.norm1.weight"
    modulated = dataclasses.replace(PRESETS["tiny32"], conditioning="adaln")
    assert "ft_layers.0.adaLN_modulation.1.bias" in iqpir.build(modulated, device="meta").state_dict()


def test_taps_are_those_of_the_published_network() -> None:
    network = iqpir.build("iqpir512", device="meta")
    assert network.encoder.taps == {512: 2, 256: 5, 128: 8, 64: 11, 32: 14, 16: 18}
    assert network.generator.taps == {16: 6, 32: 9, 64: 12, 128: 15, 256: 18, 512: 21}
