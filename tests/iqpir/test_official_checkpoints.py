"""Published checkpoint files are read, recognised and refused as they should be."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import iqpir
from iqpir.config import PRESETS, NetworkConfig
from iqpir.errors import UsageError
from iqpir.official_checkpoints import is_autoencoder_only, load_official

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


def state_of(config: NetworkConfig = TINY) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return iqpir.build(config).state_dict()


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        PRESETS["tiny64"],
        dataclasses.replace(TINY, quality_bins=(20, 10, 20)),
        dataclasses.replace(TINY, conditioning="none", fusion="attention"),
        dataclasses.replace(TINY, codebooks="single", alpha=0.0, conditioning="none", connect_sizes=()),
        dataclasses.replace(TINY, attention_sizes=(16, 8), res_blocks=2, transformer_layers=1, connect_sizes=(16, 8)),
        dataclasses.replace(TINY, attention_sizes=()),
    ],
    ids=["three-levels", "tiny64", "several-scores", "attention", "single", "more-attention", "no-attention"],
)
def test_the_configuration_is_read_off_the_file(config: NetworkConfig, tmp_path: Path) -> None:
    state = state_of(config)
    expected = dataclasses.replace(config, connect_sizes=tuple(sorted(config.connect_sizes)))
    found, loaded = load_official(save(tmp_path / "net.pth", {"params_ema": state}), transformer_heads=4)
    assert found == expected
    iqpir.build(found).load_state_dict(loaded)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["iqpir512", "codeformer512"])
def test_the_published_sizes_are_the_presets(name: str, tmp_path: Path) -> None:
    # One element stands for each whole tensor: real shapes, and a file of some hundred kilobytes.
    shapes = iqpir.build(name, device="meta").state_dict()
    state = {key: torch.zeros(1).expand(value.shape) for key, value in shapes.items()}
    found, _ = load_official(save(tmp_path / "net.pth", {"params_ema": state}))
    assert found == PRESETS[name]


def test_averaged_weights_come_before_raw_ones(tmp_path: Path) -> None:
    raw, averaged = state_of(), {key: value + 1 for key, value in state_of().items()}
    path = save(tmp_path / "net.pth", {"params": raw, "params_ema": averaged})
    assert torch.equal(load_official(path, transformer_heads=4)[1]["position_emb"], averaged["position_emb"])
    path = save(tmp_path / "raw.pth", {"params": raw})
    assert torch.equal(load_official(path, transformer_heads=4)[1]["position_emb"], raw["position_emb"])


def test_the_prefix_of_parallel_training_is_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pth", {"params": {f"module.{key}": value for key, value in state_of().items()}})
    found, state = load_official(path, transformer_heads=4)
    assert found == TINY
    assert list(state) == list(state_of())


def test_a_bare_state_dict_and_safetensors_are_read(tmp_path: Path) -> None:
    assert load_official(save(tmp_path / "bare.pth", state_of()), transformer_heads=4)[0] == TINY
    safetensors.torch.save_file(state_of(), tmp_path / "net.safetensors")
    assert load_official(tmp_path / "net.safetensors", transformer_heads=4)[0] == TINY


def test_what_the_file_does_not_tell_is_the_callers(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pth", state_of())
    found, _ = load_official(path, alpha=0.5, hq_threshold=0.9, transformer_heads=2)
    assert (found.alpha, found.hq_threshold, found.transformer_heads) == (0.5, 0.9, 2)


def test_a_file_of_the_autoencoder_alone_is_recognised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = iqpir.build(TINY)
    path = save(tmp_path / "vqgan.pth", {"params": network.autoencoder_state()})
    found, state = load_official(path, autoencoder_size=32)
    assert is_autoencoder_only(state)
    assert not is_autoencoder_only(state_of())
    assert (found.image_size, found.attention_sizes, found.codebooks) == (32, (8,), "dual")
    target = iqpir.build(TINY)
    target.load_autoencoder(state)
    assert torch.equal(target.generator.last_weight, network.generator.last_weight)


def test_a_restorer_is_loaded_from_a_published_file(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, transformer_heads=8)
    path = save(tmp_path / "net.pth", {"params_ema": state_of(config)})
    restorer = iqpir.Restorer.load(path)
    picture = torch.rand(3, 40, 32, generator=torch.Generator().manual_seed(0))
    network = iqpir.build(config)
    network.load_state_dict(state_of(config))
    for fidelity in (0.0, 0.7):
        expected = iqpir.Restorer(network).restore(picture, fidelity=fidelity)
        assert torch.equal(restorer.restore(picture, fidelity=fidelity), expected)
    assert restorer.metadata == {"stage": "official", "lineage": {"official": "net.pth"}}
    with pytest.raises(UsageError, match="cannot be read as weights"):
        iqpir.Restorer.load(save(tmp_path / "code.pth", {"params": Code()}))
    alone = save(tmp_path / "vqgan.pth", {"params": network.autoencoder_state()})
    with pytest.raises(UsageError, match="autoencoder of stage 1 alone"):
        iqpir.Restorer.load(alone)


def damaged(**changes: Any) -> dict[str, Tensor]:
    state = state_of()
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(feat_emb__bias=None), "feat_emb.bias is missing"),
        (damaged(stranger=torch.zeros(1)), "stranger is unknown"),
        (damaged(feat_emb__bias=torch.zeros(3)), r"feat_emb.bias has shape \[3\] instead of \[128\]"),
        (damaged(idx_pred_layer__1__weight=torch.zeros(256, 128)), r"idx_pred_layer.1.weight has shape"),
        (damaged(quantize_aesthetic__embedding__weight=None), r"idx_pred_layer.1.weight has shape"),
        (damaged(score_embed__weight=torch.zeros(10, 7)), "score_embed has 7 values"),
        (damaged(quantize__embedding__weight=None), "no CodeFormer or IQPIR checkpoint"),
        ({"main.0.weight": torch.zeros(3)}, "no CodeFormer or IQPIR checkpoint"),
        ({"epoch": 3, "optimizers": []}, "holds no weights under params_ema or params"),
        ([1, 2], "holds a list"),
        (state_of(dataclasses.replace(TINY, conditioning="adaln")), "adaptive layer norm"),
    ],
)
def test_a_file_that_does_not_fit_says_why(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_official(save(tmp_path / "net.pth", content), transformer_heads=4)


class Code:
    """An object whose reading would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_unreadable_files_are_refused_and_no_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.pth").write_bytes(b"\x00not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "empty.pth").write_bytes(b"")
    save(tmp_path / "code.pth", {"params": Code()})
    whole = save(tmp_path / "net.pth", {"params": state_of()}).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    for name in ("absent.pth", "noise.pth", "noise.safetensors", "empty.pth", "code.pth", "cut.pth"):
        with pytest.raises(UsageError, match="cannot be read as weights"):
            load_official(tmp_path / name)
    assert "ran" not in capsys.readouterr().out
