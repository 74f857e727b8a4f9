"""A checkpoint that tests can register: fresh weights, no training."""

from pathlib import Path

import torch

from iqpir.networks.restoration_network import build
from iqpir.restorer import save_model
from iqpir.training.checkpoint import write_manifest


def write_checkpoint(directory: Path, seed: int = 2603, stage: str = "stage2") -> Path:
    """A tiny32 model directory with a manifest, as training leaves it."""
    torch.manual_seed(seed)
    metadata = {
        "stage": stage,
        "step": 7,
        "samples_seen": 70,
        "weights_digest": f"weights-{seed}",
        "stage1_digest": "autoencoder",
        "lineage": {"view": "hq@v0001", "calibration": "c0ffee"},
    }
    save_model(build("tiny32"), directory, metadata)
    write_manifest(directory, {"step": 7, "samples_seen": 70, "stage": stage})
    return directory
