"""One rank of a training of two; test_distributed.py starts it with RANK and WORLD_SIZE set."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

FILE = Path(__file__).parent / "tiny_training.py"
spec = importlib.util.spec_from_file_location("tiny_training", FILE)
assert spec and spec.loader
tiny = importlib.util.module_from_spec(spec)
sys.modules["tiny_training"] = tiny
spec.loader.exec_module(tiny)

from iqpir.networks.restoration_network import RestorationNetwork  # noqa: E402
from iqpir.stages.stage1 import Stage1  # noqa: E402
from iqpir.stages.stage2 import Stage2, Stage2Config  # noqa: E402
from iqpir.stages.stage3 import Stage3, Stage3Config  # noqa: E402
from iqpir.training.checkpoint import weights_digest  # noqa: E402
from iqpir.training.distributed import Distributed  # noqa: E402
from iqpir.training.folder_sink import FolderSink  # noqa: E402

STEPS = 4


def network() -> RestorationNetwork:
    """The tiny network, but with three channels in each group norm's group.

    With one, biases in front of a norm have no gradient but rounding, which Adam blows up to whole steps.
    """
    made: RestorationNetwork = tiny.network(base_channels=48)
    return made


def make_stage(name: str, ranks: Distributed) -> Stage1 | Stage2 | Stage3:
    """The stage as both the one-process and the two-process training use it."""
    if name == "stage1":
        config = tiny.stage1_config(codebook_ema=tiny.EmaConfig(revive_every=0, decay=0.9, kmeans_iterations=0))
        return Stage1(config, perceptual=tiny.smooth_l2, distributed=ranks)
    if name == "stage2":
        config = Stage2Config(
            optimiser=tiny.RATE, quality_grad="logits", quality_target="match", dial_fraction=0.5, quality_jitter=2
        )
        return Stage2(config, quality_prior=tiny.Sharpness(), teacher=network(), distributed=ranks)
    config = Stage3Config(
        optimiser=tiny.RATE,
        adversary=tiny.stage1_config().adversary,
        first_steps=2,
        second_steps=0,
        code_steps=1,
        fidelity_every=2,
    )
    return Stage3(config, perceptual=tiny.smooth_l2, teacher=network(), distributed=ranks)


def train(name: str, folder: Path, steps: int = STEPS) -> None:
    """Train, and write what this rank ended with."""
    ranks = Distributed.current()
    stage = make_stage(name, ranks)
    fresh = network()
    if ranks.rank > 0:
        with torch.no_grad():
            # Another start than rank 0's: it must be given rank 0's weights.
            fresh.feat_emb.weight += 1.0
            fresh.encoder.blocks[0].weight += 1.0
    torch.manual_seed(ranks.rank)
    state = stage.initial_state(fresh, seed=tiny.SEED)
    torch.manual_seed(11)
    stop_at = int(os.environ.get("STOP_RANK_1_AT", "-1"))
    result, log = tiny.run(
        stage,
        state,
        steps=steps,
        folder=folder / f"rank-{ranks.rank}",
        sink=FolderSink(folder / "kept"),
        distributed=ranks,
        stop=lambda: ranks.rank == 1 and state.step == stop_at,
    )
    digests = {name: weights_digest(book.state_dict()) for name, book in state.codebooks.items()}
    facts = {
        "status": result.status,
        "step": result.step,
        "samples_seen": result.samples_seen,
        "network": weights_digest(state.network.state_dict()),
        "ema": weights_digest(state.ema.module.state_dict()),
        "codebooks": digests,
        "metrics": log.values,
    }
    (folder / f"facts-{ranks.rank}.json").write_text(json.dumps(facts))
    if state.discriminator is not None:
        torch.save(state.discriminator.state_dict(), folder / f"discriminator-{ranks.rank}.pt")
    torch.save(state.network.state_dict(), folder / f"network-{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    train(sys.argv[1], Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
