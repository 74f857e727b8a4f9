"""The speed switches do what they say and leave keys and results alone."""

import copy
import shutil
from types import ModuleType

import pytest
import torch
import torch._dynamo.utils
from torch import nn

from iqpir.networks.blocks import ResidualBlock
from iqpir.stages.adversary import AdversaryConfig
from iqpir.stages.stage1 import Stage1
from iqpir.stages.stage2 import Stage2, Stage2Config
from iqpir.training.precision import FP32, PrecisionConfig, compiled_blocks, prepare


def first_losses(tiny: ModuleType, precision: PrecisionConfig, steps: int = 2) -> list[dict[str, float]]:
    config = tiny.stage1_config(warmup_steps=0, adversary=AdversaryConfig(start_step=1, base_channels=8, norm="group"))
    stage = Stage1(config, perceptual=tiny.smooth_l2, precision=precision)
    state = stage.initial_state(tiny.network(), seed=1)
    found = []
    for state.step in range(steps):
        values = stage.step(state, tiny.batch(torch.arange(4)))
        found.append({name: value.item() for name, value in values.items()})
    return found


def test_bf16_runs_the_network_in_bf16_and_the_losses_in_fp32(tiny: ModuleType) -> None:
    seen: dict[str, torch.dtype] = {}
    stage = Stage2(
        Stage2Config(quality_grad="logits"),
        quality_prior=tiny.Sharpness(),
        teacher=tiny.network(),
        precision=PrecisionConfig(dtype="bf16"),
    )
    state = stage.initial_state(tiny.network(), seed=1)
    for name in ("encoder.blocks.0", "generator.blocks.0", "feat_emb"):
        state.network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.__setitem__(name, output.dtype)
        )
    values = stage.step(state, tiny.batch(torch.arange(4)))
    assert set(seen.values()) == {torch.bfloat16}
    assert len(seen) == 3
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert {p.dtype for p in state.network.parameters()} == {torch.float32}


def test_bf16_losses_are_close_to_fp32(tiny: ModuleType) -> None:
    exact, rounded = first_losses(tiny, FP32, 1)[0], first_losses(tiny, PrecisionConfig(dtype="bf16"), 1)[0]
    assert exact != rounded
    for name in ("pixel_loss", "perceptual_loss", "loss"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.05)


def test_channels_last_lays_weights_out_and_changes_no_result(tiny: ModuleType) -> None:
    network = prepare(tiny.network(), PrecisionConfig(channels_last=True))
    weight = network.encoder.blocks[1].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    batch = tiny.batch(torch.arange(2))
    features = network.encode(batch.hq)
    assert features.is_contiguous(memory_format=torch.channels_last), "the layout goes through the network"
    torch.testing.assert_close(features, tiny.network().encode(batch.hq), rtol=1e-4, atol=1e-5)


def test_compilation_takes_the_repeated_blocks_and_keeps_the_keys(tiny: ModuleType) -> None:
    network = tiny.network()
    keys = list(network.state_dict())
    blocks = compiled_blocks(prepare(network, PrecisionConfig(compile=True)))
    assert list(network.state_dict()) == keys
    names = {type(block).__name__ for block in blocks}
    assert {"ResidualBlock", "AttentionBlock", "CodeTransformerLayer", "FuseBlock"} <= names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_blocks_give_the_results_and_gradients_of_eager_ones() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.ModuleList([ResidualBlock(8, 8)]))
    compiled = prepare(copy.deepcopy(eager), PrecisionConfig(compile=True))
    features = torch.randn(2, 8, 8, 8)
    results = []
    for network in (eager, compiled):
        output = network[0][0](features)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in network.parameters())])
    assert any(count > 0 for count in torch._dynamo.utils.counters["stats"].values()), "it was compiled"
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
