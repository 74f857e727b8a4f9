"""A published checkpoint file (CodeFormer, IQPIR) as a checkpoint directory of ours."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from iqpir.errors import UsageError
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.official_checkpoints import OFFICIAL, official_network
from iqpir.restorer import save_model
from iqpir.training.checkpoint import file_sha256, stage1_digest, weights_digest, write_manifest
from pipeline.storage import Storage


@dataclass(frozen=True, kw_only=True)
class OfficialConfig:
    """A published checkpoint, and what its file does not tell."""

    file: str = ""
    """Path or URL of a .pth or .safetensors file in the published layout; it is read without running code from it."""
    alpha: float = 0.8
    """Weight of the HQ+ code; 0.8 is what the authors trained with."""
    hq_threshold: float = 0.7
    """Quality above which stage 1 used the HQ+ codebook; 0.7 is what the authors trained with."""
    transformer_heads: int = 8
    """Attention heads of the Transformer."""


def official_checkpoint(config: OfficialConfig, into: Path) -> Path:
    """Write the checkpoint directory of a published file.

    Args:
        config: the file.
        into: an existing folder; the checkpoint is in a new one below.

    Raises:
        UsageError: there is no such file, it is no such checkpoint, or it holds the autoencoder alone.
    """
    path = PurePosixPath(config.file)
    storage = Storage.open(config.file[: -len(path.name)].rstrip("/") or ".")
    if not storage.exists(path.name):
        raise UsageError(f"There is no checkpoint file at {config.file}.", "Give the path of a .pth or .safetensors.")
    local = storage.local(path.name)
    if local is None:
        local = into / path.name
        storage.download(path.name, local)
    network = official_network(
        local, alpha=config.alpha, hq_threshold=config.hq_threshold, transformer_heads=config.transformer_heads
    )
    target = into / "checkpoint"
    save_model(network, target, _metadata(network, path.name, file_sha256(local)))
    write_manifest(target, {"step": 0, "samples_seen": 0, "stage": OFFICIAL})
    return target


def _metadata(network: RestorationNetwork, name: str, sha256: str) -> dict[str, object]:
    state = network.state_dict()
    return {
        "stage": OFFICIAL,
        "step": 0,
        "samples_seen": 0,
        "weights_digest": weights_digest(state),
        "stage1_digest": stage1_digest(state),
        "lineage": {"official": name, "official_sha256": sha256},
    }
