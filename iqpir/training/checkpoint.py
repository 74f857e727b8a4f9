"""A checkpoint is a directory whose MANIFEST.json, written last, proves every other file.

config.json               network configuration and metadata (stage, step, lineage, versions)
model.safetensors         averaged weights: what is used; with config.json a model directory
network.safetensors       weights as trained
discriminator.safetensors, codebook.safetensors     where the stage has them
optimiser.pt              optimiser states; loads with ``weights_only``
rng/rank-00000.pt         random generators of each rank
MANIFEST.json             schema, step, samples_seen, stage, files: {name: {size, sha256}}
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from iqpir import __version__
from iqpir.config import NetworkConfig
from iqpir.errors import UsageError, VerificationError
from iqpir.networks.restoration_network import AUTOENCODER_PARTS
from iqpir.training.state import TrainState, restore_rng

SCHEMA = 1
MANIFEST = "MANIFEST.json"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over the sorted keys, types, shapes and bytes of ``state``: 64 hex digits.

    Equal weights have equal digests, whatever file, device or memory layout they are in.
    """
    total = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        head = json.dumps([key, str(value.dtype).removeprefix("torch."), list(value.shape)])
        total.update(head.encode() + b"\n")
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def stage1_digest(state: Mapping[str, Tensor]) -> str:
    """``weights_digest`` of the autoencoder part of a network's state dict: what codes are bound to."""
    return weights_digest({k: v for k, v in state.items() if k.split(".")[0] in AUTOENCODER_PARTS})


def save(
    directory: Path,
    state: TrainState,
    metadata: Mapping[str, Any],
    rng: Sequence[Mapping[str, Any]],
) -> None:
    """Write ``state`` into a fresh ``directory``.

    Args:
        directory: must not exist, or be empty.
        state: what to save.
        metadata: JSON values: ``stage`` (name), ``stage_config``, ``lineage`` (str to str), and more;
            step, samples_seen, seed, versions and digests are added.
        rng: ``capture_rng()`` of each rank.

    Raises:
        UsageError: the directory has files in it.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"Checkpoint directory {directory} is not empty.", "Write into a fresh one.")
    (directory / "rng").mkdir(parents=True, exist_ok=True)
    model = _portable(state.ema.module.state_dict())
    save_file(model, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(_portable(state.network.state_dict()), directory / "network.safetensors")
    if state.discriminator is not None:
        weights = _portable(state.discriminator.state_dict())
        save_file(weights, directory / "discriminator.safetensors")
    if state.codebooks:
        statistics = {
            f"{name}.{key}": value
            for name, codebook in state.codebooks.items()
            for key, value in codebook.state_dict().items()
        }
        save_file(_portable(statistics), directory / "codebook.safetensors")
    states = {name: optimiser.state_dict() for name, optimiser in state.optimisers.items()}
    torch.save(states, directory / "optimiser.pt")
    for rank, generators in enumerate(rng):
        torch.save(dict(generators), directory / "rng" / f"rank-{rank:05d}.pt")
    facts = {
        **metadata,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "seed": state.seed,
        "world_size": len(rng),
        "weights_digest": weights_digest(model),
        "stage1_digest": stage1_digest(model),
        "versions": {
            "iqpir": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
    }
    _write_json(
        directory / "config.json",
        {"schema": SCHEMA, "network": state.network.config.to_dict(), "metadata": facts},
    )
    write_manifest(directory, {"step": state.step, "samples_seen": state.samples_seen, "stage": facts["stage"]})


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
    """Record size and sha256 of every file under ``directory`` in MANIFEST.json, atomically and durably."""
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    for name in files:
        _sync(directory / name)
    draft = directory / f"{MANIFEST}.tmp"
    _write_json(draft, {"schema": SCHEMA, **facts, "files": files})
    _sync(draft)
    draft.replace(directory / MANIFEST)


def verify(directory: Path) -> dict[str, Any]:
    """Prove that ``directory`` is what its manifest says, and return the manifest.

    Raises:
        VerificationError: no manifest, or a file is missing or has another size or digest.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise VerificationError(f"{directory} has no {MANIFEST}: it was not written to its end.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{path} is no manifest: {error}.") from error
    if manifest.get("schema") != SCHEMA:
        raise VerificationError(
            f"{path} has schema {manifest.get('schema')}; this version reads {SCHEMA}.",
            "Use the version of iqpir that wrote it.",
        )
    for name, record in files.items():
        file = directory / name
        if not file.is_file():
            raise VerificationError(f"{file} is missing.")
        if file.stat().st_size != record["size"]:
            raise VerificationError(f"{file} has {file.stat().st_size} bytes, not {record['size']}.")
        if file_sha256(file) != record["sha256"]:
            raise VerificationError(f"{file} has another sha256 than its manifest says.")
    return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint directory; its tensors are read when they are asked for, onto the CPU."""

    directory: Path
    """Where it lies."""
    network_config: NetworkConfig
    """Sizes and variants of the network."""
    metadata: dict[str, Any]
    """stage, stage_config, lineage, step, samples_seen, seed, versions, digests."""

    @property
    def step(self) -> int:
        """Optimisation steps done."""
        return int(self.metadata["step"])

    @property
    def samples_seen(self) -> int:
        """Samples consumed over all ranks."""
        return int(self.metadata["samples_seen"])

    @property
    def stage(self) -> str:
        """Name of the stage that wrote it."""
        return str(self.metadata["stage"])

    @cached_property
    def model(self) -> dict[str, Tensor]:
        """Averaged weights."""
        return load_file(self.directory / "model.safetensors")

    def restore(self, state: TrainState, *, stage: str, rank: int = 0) -> None:
        """Put everything saved into ``state``, in place, and this rank's random generators back.

        A rank that the writing run did not have keeps its generators.

        Raises:
            UsageError: the checkpoint is of another stage, seed or network than ``state``.
            VerificationError: it lacks a part that ``state`` has.
        """
        self._require_same_run(state, stage)
        state.network.load_state_dict(load_file(self.directory / "network.safetensors"))
        state.ema.module.load_state_dict(self.model)
        if state.discriminator is not None:
            state.discriminator.load_state_dict(load_file(self._part("discriminator.safetensors")))
        if state.codebooks:
            statistics = load_file(self._part("codebook.safetensors"))
            for name, codebook in state.codebooks.items():
                prefix = f"{name}."
                codebook.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in statistics.items() if k.startswith(prefix)}
                )
        optimisers = torch.load(self._part("optimiser.pt"), map_location="cpu", weights_only=True)
        for name, optimiser in state.optimisers.items():
            optimiser.load_state_dict(optimisers[name])
        state.step, state.samples_seen = self.step, self.samples_seen
        generators = self.directory / "rng" / f"rank-{rank:05d}.pt"
        if generators.is_file():
            restore_rng(torch.load(generators, weights_only=True))

    def _require_same_run(self, state: TrainState, stage: str) -> None:
        for what, saved, wanted in (
            ("stage", self.stage, stage),
            ("seed", self.metadata["seed"], state.seed),
            ("network", self.network_config, state.network.config),
        ):
            if saved != wanted:
                raise UsageError(
                    f"{self.directory} was trained with {what} {saved}, this training has {wanted}.",
                    "Resume with the same configuration, or start in a new place.",
                )

    def _part(self, name: str) -> Path:
        path = self.directory / name
        if not path.is_file():
            raise VerificationError(f"{self.directory} has no {name}, which this training needs.")
        return path


def load(directory: Path) -> Checkpoint:
    """Verify ``directory`` and read its configuration.

    Raises:
        VerificationError: see ``verify``.
    """
    verify(directory)
    record = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return Checkpoint(directory, NetworkConfig.from_dict(record["network"]), record["metadata"])


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _portable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors in plain layout that share no memory, as safetensors wants them."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
