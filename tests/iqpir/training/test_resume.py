"""A training that was stopped and continued is bit for bit the training that was not."""

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from iqpir.errors import PermanentError, UsageError
from iqpir.stages.stage1 import Stage1
from iqpir.stages.stage2 import Stage2, Stage2Config
from iqpir.stages.stage3 import Stage3, Stage3Config
from iqpir.training.folder_sink import FolderSink
from iqpir.training.loop import Stage
from iqpir.training.state import TrainState


def make_stage1(tiny: ModuleType) -> tuple[Stage, TrainState]:
    stage = Stage1(tiny.stage1_config(), perceptual=tiny.smooth_l2)
    return stage, stage.initial_state(tiny.network(), seed=tiny.SEED)


def make_stage2(tiny: ModuleType) -> tuple[Stage, TrainState]:
    config = Stage2Config(
        optimiser=tiny.RATE,
        quality_grad="logits",
        quality_target="match",
        dial_fraction=0.5,
        quality_every=2,
        ema_warmup=True,
    )
    stage = Stage2(config, quality_prior=tiny.Sharpness(), teacher=tiny.network())
    return stage, stage.initial_state(tiny.network(), seed=tiny.SEED)


def make_stage3(tiny: ModuleType) -> tuple[Stage, TrainState]:
    config = Stage3Config(
        optimiser=tiny.RATE,
        adversary=tiny.stage1_config().adversary,
        first_steps=2,
        second_steps=1,
        code_steps=2,
        fidelity_every=2,
    )
    stage = Stage3(config, perceptual=tiny.smooth_l2, teacher=tiny.network())
    return stage, stage.initial_state(tiny.network(), seed=tiny.SEED)


MAKERS = {"stage1": make_stage1, "stage2": make_stage2, "stage3": make_stage3}


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor that a training changes."""
    found = {f"network.{k}": v for k, v in state.network.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in state.ema.module.state_dict().items()}
    if state.discriminator is not None:
        found |= {f"discriminator.{k}": v for k, v in state.discriminator.state_dict().items()}
    for name, book in state.codebooks.items():
        found |= {f"{name}.{k}": v for k, v in book.state_dict().items()}
    for name, optimiser in state.optimisers.items():
        for number, values in optimiser.state_dict()["state"].items():
            found |= {f"{name}.{number}.{k}": v for k, v in values.items()}
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_training_is_bitwise_the_uninterrupted_one(name: str, tiny: ModuleType, tmp_path: Path) -> None:
    stage, straight = MAKERS[name](tiny)
    _, whole = tiny.run(stage, straight, steps=6, folder=tmp_path, sink=FolderSink(tmp_path / "a"))

    stage, first = MAKERS[name](tiny)
    result, _ = tiny.run(stage, first, steps=3, folder=tmp_path, sink=FolderSink(tmp_path / "b"))
    assert (result.status, result.step, result.samples_seen) == ("done", 3, 12)
    torch.manual_seed(999)
    stage, second = MAKERS[name](tiny)
    result, rest = tiny.run(stage, second, steps=6, folder=tmp_path, sink=FolderSink(tmp_path / "b"))

    assert (result.resumed_from, result.step, result.samples_seen) == (3, 6, 24)
    expected, got = tensors_of(straight), tensors_of(second)
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []
    untimed = {"samples_per_second", "data_wait_share", "tflops_per_second", "host_memory_gib"}
    for step in (4, 5, 6):
        assert {k: v for k, v in whole.values[step].items() if k not in untimed} == {
            k: v for k, v in rest.values[step].items() if k not in untimed
        }
    assert all(math.isfinite(v) for values in whole.values.values() for v in values.values())
    assert all(rest.values[step]["tflops_per_second"] > 0 for step in (4, 5, 6))


def test_the_weights_of_a_resumed_training_do_change(tiny: ModuleType, tmp_path: Path) -> None:
    stage, state = make_stage1(tiny)
    before = {k: v.clone() for k, v in tensors_of(state).items() if k.startswith(("network.enc", "ema.gen"))}
    tiny.run(stage, state, steps=2, folder=tmp_path, sink=FolderSink(tmp_path / "a"))
    assert all(not torch.equal(v, tensors_of(state)[k]) for k, v in before.items())


def test_a_stop_flag_ends_training_with_a_checkpoint_to_go_on_from(tiny: ModuleType, tmp_path: Path) -> None:
    stage, state = make_stage1(tiny)
    sink = FolderSink(tmp_path / "a")
    result, _ = tiny.run(stage, state, steps=6, folder=tmp_path, sink=sink, stop=lambda: state.step == 2)
    assert (result.status, result.step) == ("stopped", 2)
    stage, again = make_stage1(tiny)
    result, _ = tiny.run(stage, again, steps=3, folder=tmp_path, sink=FolderSink(tmp_path / "a"))
    assert (result.status, result.resumed_from) == ("done", 2)


def test_a_finished_training_does_nothing_more(tiny: ModuleType, tmp_path: Path) -> None:
    stage, state = make_stage1(tiny)
    tiny.run(stage, state, steps=1, folder=tmp_path, sink=FolderSink(tmp_path / "a"))
    stage, state = make_stage1(tiny)
    result, log = tiny.run(stage, state, steps=1, folder=tmp_path, sink=FolderSink(tmp_path / "a"))
    assert (result.status, result.resumed_from, log.values) == ("done", 1, {})


def test_a_non_finite_loss_names_its_step_and_leaves_no_checkpoint(tiny: ModuleType, tmp_path: Path) -> None:
    calls = []

    def breaks_at_third(restored: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return restored.mean() * (math.nan if len(calls) == 3 else 1.0)

    stage = Stage1(tiny.stage1_config(), perceptual=breaks_at_third)
    state = stage.initial_state(tiny.network(), seed=tiny.SEED)
    with pytest.raises(PermanentError, match="step 3"):
        tiny.run(stage, state, steps=5, folder=tmp_path, sink=FolderSink(tmp_path / "a"))
    assert FolderSink(tmp_path / "a").latest(tmp_path) is None


def test_a_checkpoint_of_another_seed_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    stage, state = make_stage1(tiny)
    tiny.run(stage, state, steps=1, folder=tmp_path, sink=FolderSink(tmp_path / "a"))
    other = stage.initial_state(tiny.network(), seed=tiny.SEED + 1)
    with pytest.raises(UsageError, match="seed"):
        tiny.run(stage, other, steps=2, folder=tmp_path, sink=FolderSink(tmp_path / "a"))


def test_previews_are_logged_and_change_nothing(tiny: ModuleType, tmp_path: Path) -> None:
    from iqpir.training.loop import FitConfig

    finals = []
    for every in (0, 1):
        stage, state = make_stage1(tiny)
        config = FitConfig(steps=3, log_every=3, preview_every=every)
        folder = tmp_path / str(every)
        _, log = tiny.run(stage, state, steps=3, folder=folder, sink=FolderSink(folder / "a"), config=config)
        finals.append(tensors_of(state))
        assert sorted(log.images) == ([1, 2, 3] if every else [])
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])
    assert log.images[3].shape == (32, 64, 3)
    assert log.images[3].dtype.name == "uint8"
