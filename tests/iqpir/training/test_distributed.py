"""Two processes train what one process with the global batch trains, and never drift apart."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iqpir.training.distributed import SINGLE, Distributed

SCRIPT = Path(__file__).parent / "gloo_rank.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(stage: str, folder: Path, world: int, **environment: str) -> list[dict[str, object]]:
    """Run the script in ``world`` processes and return what each one wrote."""
    folder.mkdir(exist_ok=True)
    common = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if world > 1:
        common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), stage, str(folder)],
            env=common | ({"RANK": str(rank)} if world > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(world)]


def test_one_process_is_its_own_world() -> None:
    value = torch.tensor([1.0, 2.0])
    assert Distributed.current() == SINGLE
    assert torch.equal(SINGLE.mean(value), value)
    assert torch.equal(SINGLE.maximum(value), value)
    assert SINGLE.gather("x") == ["x"]
    assert SINGLE.any(True)
    assert not SINGLE.any(False)
    SINGLE.barrier()
    SINGLE.require_equal(3, "nothing")
    layer = torch.nn.Linear(1, 1)
    assert SINGLE.wrap(layer) is layer


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_two_ranks_train_what_one_process_trains(stage: str, tmp_path: Path) -> None:
    (alone,) = train(stage, tmp_path / "one", 1)
    first, second = train(stage, tmp_path / "two", 2)

    assert first["network"] == second["network"]
    assert first["ema"] == second["ema"]
    assert first["codebooks"] == second["codebooks"]
    assert bool(first["codebooks"]) == (stage == "stage1")
    assert first["samples_seen"] == alone["samples_seen"] == 16
    assert second["metrics"] == {}, "rank 0 alone reports"

    for part in ("network", "discriminator"):
        if part == "discriminator" and stage == "stage2":
            continue
        one = torch.load(tmp_path / "one" / f"{part}-0.pt", weights_only=True)
        two = torch.load(tmp_path / "two" / f"{part}-0.pt", weights_only=True)
        other = torch.load(tmp_path / "two" / f"{part}-1.pt", weights_only=True)
        for key, value in one.items():
            assert torch.equal(two[key], other[key]), key
            if key.endswith(".k.bias"):
                continue  # softmax ignores it: its gradient is rounding, which Adam makes whole steps of
            # Single elements may have such gradients too.
            assert (two[key] - value).abs().quantile(0.9) < 1e-4, key
    for step, values in alone["metrics"].items():
        for name in set(values) - {"samples_per_second", "data_wait_share", "tflops_per_second", "host_memory_gib"}:
            got = first["metrics"][step][name]
            assert got == pytest.approx(values[name], rel=2e-2, abs=2e-3), (step, name)


@pytest.mark.slow
def test_a_stop_on_one_rank_stops_all_and_all_go_on(tmp_path: Path) -> None:
    stopped = train("stage1", tmp_path, 2, STOP_RANK_1_AT="3")
    assert [(facts["status"], facts["step"]) for facts in stopped] == [("stopped", 3)] * 2
    kept = tmp_path / "kept" / "step_00000003-a1"
    assert sorted(path.name for path in (kept / "rng").iterdir()) == ["rank-00000.pt", "rank-00001.pt"]
    resumed = train("stage1", tmp_path, 2)
    straight = train("stage1", tmp_path / "straight", 2)
    assert [facts["status"] for facts in resumed] == ["done", "done"]
    assert [facts["network"] for facts in resumed] == [facts["network"] for facts in straight]
    assert [facts["codebooks"] for facts in resumed] == [facts["codebooks"] for facts in straight]
