"""A checkpoint proves itself, is a model directory, and a damaged one is passed over."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType

import pytest
import torch

from iqpir import Restorer
from iqpir.errors import UsageError, VerificationError
from iqpir.stages.stage1 import Stage1
from iqpir.training import checkpoint
from iqpir.training.checkpoint import MANIFEST, stage1_digest, verify, weights_digest
from iqpir.training.folder_sink import FolderSink
from iqpir.training.state import TrainState, capture_rng, restore_rng

METADATA = {"stage": "stage1", "stage_config": {"a": 1}, "lineage": {"view": "abc"}}


@pytest.fixture(scope="module")
def state(tiny: ModuleType) -> TrainState:
    stage = Stage1(tiny.stage1_config(warmup_steps=0), perceptual=tiny.smooth_l2)
    made = stage.initial_state(tiny.network(), seed=tiny.SEED)
    for made.step in range(2):
        stage.step(made, tiny.batch(torch.arange(4)))
    made.step, made.samples_seen = 2, 8
    return made


@pytest.fixture
def saved(state: TrainState, tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "made", state, METADATA, [capture_rng()])
    return tmp_path / "made"


def test_files_of_a_checkpoint(saved: Path) -> None:
    names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    payload = {
        "config.json",
        "model.safetensors",
        "network.safetensors",
        "discriminator.safetensors",
        "codebook.safetensors",
        "optimiser.pt",
        "rng/rank-00000.pt",
    }
    assert names == payload | {MANIFEST}
    manifest = verify(saved)
    assert set(manifest["files"]) == payload
    assert (manifest["step"], manifest["samples_seen"], manifest["stage"]) == (2, 8, "stage1")


def test_metadata_comes_back(saved: Path, state: TrainState) -> None:
    found = checkpoint.load(saved)
    assert (found.step, found.samples_seen, found.stage) == (2, 8, "stage1")
    assert found.network_config == state.network.config
    assert found.metadata["lineage"] == {"view": "abc"}
    assert found.metadata["stage_config"] == {"a": 1}
    assert found.metadata["seed"] == state.seed
    assert found.metadata["weights_digest"] == weights_digest(found.model)
    assert found.metadata["stage1_digest"] == stage1_digest(found.model)
    assert found.metadata["versions"]["torch"] == torch.__version__


def test_a_checkpoint_is_a_model_directory_of_the_averaged_weights(saved: Path, state: TrainState) -> None:
    restorer = Restorer.load(saved)
    picture = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    assert restorer.restore(picture, quality=0.9).shape == (16, 16, 3)
    assert weights_digest(checkpoint.load(saved).model) == weights_digest(state.ema.module.state_dict())
    assert weights_digest(state.network.state_dict()) != weights_digest(state.ema.module.state_dict())


def every_file(saved: Path) -> list[Path]:
    return [path for path in sorted(saved.rglob("*")) if path.is_file()]


def test_any_flipped_bit_is_found(saved: Path) -> None:
    for path in every_file(saved):
        if path.name == MANIFEST:
            continue
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bytes(bad))
        with pytest.raises(VerificationError, match="sha256"):
            verify(saved)
        path.write_bytes(good)
    verify(saved)


def test_cut_missing_and_unfinished_files_are_found(saved: Path) -> None:
    model = saved / "model.safetensors"
    good = model.read_bytes()
    model.write_bytes(good[:-1])
    with pytest.raises(VerificationError, match="bytes, not"):
        checkpoint.load(saved)
    model.unlink()
    with pytest.raises(VerificationError, match="missing"):
        checkpoint.load(saved)
    model.write_bytes(good)
    (saved / MANIFEST).write_text("{")
    with pytest.raises(VerificationError, match="no manifest"):
        checkpoint.load(saved)
    (saved / MANIFEST).unlink()
    with pytest.raises(VerificationError, match="not written to its end"):
        checkpoint.load(saved)


def test_a_newer_schema_is_refused(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(VerificationError, match="schema 99"):
        verify(saved)


def test_saving_over_something_is_refused(saved: Path, state: TrainState) -> None:
    with pytest.raises(UsageError, match="not empty"):
        checkpoint.save(saved, state, METADATA, [capture_rng()])


def test_another_stage_or_network_is_refused(saved: Path, tiny: ModuleType, state: TrainState) -> None:
    with pytest.raises(UsageError, match="stage"):
        checkpoint.load(saved).restore(state, stage="stage2")
    other = Stage1(tiny.stage1_config(), perceptual=tiny.smooth_l2)
    changed = other.initial_state(tiny.network(alpha=0.5), seed=tiny.SEED)
    with pytest.raises(UsageError, match="network"):
        checkpoint.load(saved).restore(changed, stage="stage1")


def test_random_generators_come_back(saved: Path, tiny: ModuleType) -> None:
    before = capture_rng()
    first = torch.rand(3)
    restore_rng(before)
    assert torch.equal(torch.rand(3), first)


def test_digest_sees_every_difference_and_no_layout() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}
    digest = weights_digest(weights)
    assert len(digest) == 64
    assert weights_digest(dict(reversed(weights.items()))) == digest
    assert weights_digest({**weights, "a": weights["a"].t().contiguous().t()}) == digest
    assert weights_digest({**weights, "a": weights["a"].view(3, 2)}) != digest
    assert weights_digest({**weights, "a": weights["a"] + 1e-7}) != digest
    assert weights_digest({**weights, "a": weights["a"].double()}) != digest
    assert weights_digest({"c": weights["a"], "b": weights["b"]}) != digest
    assert weights_digest({"h": torch.ones(2, dtype=torch.bfloat16)}) != digest


def test_stage_1_digest_is_blind_to_the_rest_of_the_network(tiny: ModuleType) -> None:
    network = tiny.network()
    digest = stage1_digest(network.state_dict())
    with torch.no_grad():
        network.feat_emb.weight += 1
        assert stage1_digest(network.state_dict()) == digest
        network.quantize_aesthetic.embedding.weight[0, 0] += 1
    assert stage1_digest(network.state_dict()) != digest
    assert digest == weights_digest(tiny.network().autoencoder_state())


def keep(sink: FolderSink, state: TrainState, folder: Path, step: int) -> None:
    made = folder / f"new-{step}-{sink.attempt}"
    state.step = step
    checkpoint.save(made, state, METADATA, [capture_rng()])
    sink.save(made, step)
    assert not made.exists()


def test_the_newest_good_checkpoint_is_found_and_old_ones_go(
    state: TrainState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = FolderSink(tmp_path / "kept", keep=2)
    assert sink.latest(tmp_path) is None
    for step in (1, 2, 3):
        keep(sink, state, tmp_path, step)
    folder = tmp_path / "kept"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000002-a1", "step_00000003-a1"]
    assert sink.latest(tmp_path) == folder / "step_00000003-a1"
    (folder / "step_00000003-a1" / "optimiser.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert sink.latest(tmp_path) == folder / "step_00000002-a1"
    assert "step_00000003-a1" in caplog.text

    again = FolderSink(folder, keep=5)
    assert again.attempt == 2
    keep(again, state, tmp_path, 3)
    assert again.latest(tmp_path) == folder / "step_00000003-a2"


def test_attempts_that_run_at_once_have_numbers_of_their_own(tmp_path: Path) -> None:
    sinks = [FolderSink(tmp_path / "kept") for _ in range(8)]
    together = Barrier(len(sinks))

    def claim(sink: FolderSink) -> int:
        together.wait()
        return sink.attempt

    with ThreadPoolExecutor(len(sinks)) as pool:
        assert sorted(pool.map(claim, sinks)) == list(range(1, 9))


def test_what_an_interrupted_save_left_is_no_checkpoint(state: TrainState, tmp_path: Path) -> None:
    sink = FolderSink(tmp_path / "kept")
    keep(sink, state, tmp_path, 1)
    (tmp_path / "kept" / ".incoming-step_00000002-a1").mkdir()
    (tmp_path / "kept" / "step_00000009-a1").mkdir()
    assert sink.latest(tmp_path) == tmp_path / "kept" / "step_00000001-a1"
    keep(sink, state, tmp_path, 2)
    assert sink.latest(tmp_path) == tmp_path / "kept" / "step_00000002-a1"


def test_keeping_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        FolderSink(tmp_path, keep=0)
