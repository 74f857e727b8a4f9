"""Reads checkpoints in the layout of the published CodeFormer and IQPIR files.

The network's configuration is read off the keys and shapes; what they cannot tell is asked from the caller.
Files hold a state dict under ``params_ema`` or ``params``, or are one; a ``module.`` before keys is dropped.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from iqpir.config import Codebooks, Conditioning, Fusion, NetworkConfig
from iqpir.errors import UsageError
from iqpir.networks.restoration_network import RestorationNetwork, build

OFFICIAL = "official"
"""``stage`` of such weights in a model's metadata."""

CONTAINERS = ("params_ema", "params")
"""Keys that hold the weights in a training file; the first one found is used."""

State = dict[str, Tensor]

_UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError)


def load_official(
    path: str | Path,
    *,
    alpha: float = 0.8,
    hq_threshold: float = 0.7,
    transformer_heads: int = 8,
    autoencoder_size: int = 512,
) -> tuple[NetworkConfig, State]:
    """Configuration and weights of a published checkpoint, for ``build(config).load_state_dict(state)``.

    A file of the autoencoder alone gives a state without ``position_emb`` (see ``is_autoencoder_only``), for
    ``RestorationNetwork.load_autoencoder``, and a configuration whose other parts have default sizes.

    Args:
        path: ``.pth`` (read without running code from it) or ``.safetensors``.
        alpha: weight of the HQ+ code; the file does not tell. 0.8 is what the authors trained with.
        hq_threshold: quality above which stage 1 used the HQ+ codebook; the file does not tell. 0.7 likewise.
        transformer_heads: attention heads; the file does not tell.
        autoencoder_size: side of the pictures, used for a file of the autoencoder alone, which does not tell.

    Raises:
        UsageError: the file cannot be read, is no such checkpoint, or has tensors that do not fit together.
    """
    state = _read_state(Path(path))
    try:
        config = _detect(state, alpha, hq_threshold, transformer_heads, autoencoder_size)
    except (KeyError, IndexError) as error:
        raise UsageError(
            f"{path} is no CodeFormer or IQPIR checkpoint: {error} is missing.",
            "Give a network's file (not a discriminator's or an optimiser's).",
        ) from error
    _check(state, config, str(path))
    return config, state


def official_network(
    path: str | Path, *, alpha: float = 0.8, hq_threshold: float = 0.7, transformer_heads: int = 8
) -> RestorationNetwork:
    """The network of a published checkpoint, with its weights. Arguments as for ``load_official``.

    Raises:
        UsageError: as for ``load_official``, or the file holds the autoencoder alone, which restores nothing.
    """
    config, state = load_official(path, alpha=alpha, hq_threshold=hq_threshold, transformer_heads=transformer_heads)
    if is_autoencoder_only(state):
        raise UsageError(
            f"{path} holds the autoencoder of stage 1 alone, which restores nothing.",
            "Give the file of a whole CodeFormer or IQPIR.",
        )
    network = build(config)
    network.load_state_dict(state)
    return network


def is_autoencoder_only(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds stage 1 alone."""
    return "position_emb" not in state


def _read_state(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} cannot be read as weights: {reason}.", "Check the path, and download it again."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not named weights.")
    weights = next((content[name] for name in CONTAINERS if name in content), content)
    named = isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    )
    if not named or not weights:
        raise UsageError(
            f"{path} holds no weights under {' or '.join(CONTAINERS)}, but {sorted(map(str, content))[:8]}.",
            "Give a network's checkpoint, not a training state.",
        )
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _detect(state: State, alpha: float, hq_threshold: float, heads: int, autoencoder_size: int) -> NetworkConfig:
    channels = state["quantize.embedding.weight"].shape[1]
    base = state["encoder.blocks.0.weight"].shape[0]
    widths, attended, res_blocks = _levels(state)
    if any(width % base for width in widths):
        raise UsageError(f"The encoder has {widths} channels: no multiples of its first {base}.")
    scale = 2 ** (len(widths) - 1)
    alone = is_autoencoder_only(state)
    side = autoencoder_size // scale if alone else round(state["position_emb"].shape[0] ** 0.5)
    dual = "quantize_aesthetic.embedding.weight" in state
    codebooks: Codebooks = "dual" if dual else "single"
    fusion: Fusion = "attention" if "attention.q.weight" in state else "add"
    autoencoder = NetworkConfig(
        image_size=side * scale,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        res_blocks=res_blocks,
        attention_sizes=tuple(side * scale >> level for level in attended),
        latent_channels=channels,
        codebook_size=state["quantize.embedding.weight"].shape[0],
        codebooks=codebooks,
        fusion=fusion,
        alpha=alpha if dual else 0.0,
        hq_threshold=hq_threshold,
        conditioning="none",
        connect_sizes=(),
    )
    return autoencoder if alone else _with_transformer(state, autoencoder, heads)


def _levels(state: State) -> tuple[list[int], list[int], int]:
    """Channels of each resolution level, the levels with attention, and residual blocks per level."""
    blocks = sorted({int(key.split(".")[2]) for key in state if key.startswith("encoder.blocks.")})
    kinds = [_kind(state, f"encoder.blocks.{block}.") for block in blocks]
    ends = [number for number, kind in enumerate(kinds) if kind == "down"]
    # After the last level follow: residual, attention, residual, norm, convolution.
    starts, stops = [1, *(end + 1 for end in ends)], [*ends, len(kinds) - 5]
    widths, attended = [], []
    for level, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        widths.append(state[f"encoder.blocks.{start}.conv2.weight"].shape[0])
        if "attention" in kinds[start:stop]:
            attended.append(level)
    return widths, attended, kinds[starts[0] : stops[0]].count("residual")


def _kind(state: State, prefix: str) -> str:
    names = {"conv1.weight": "residual", "q.weight": "attention", "conv.weight": "down"}
    return next((kind for name, kind in names.items() if prefix + name in state), "plain")


def _with_transformer(state: State, autoencoder: NetworkConfig, heads: int) -> NetworkConfig:
    if any("adaLN_modulation" in key for key in state):
        raise UsageError(
            "This checkpoint was trained with the published adaptive layer norm, which drops its attention.",
            "Use one with additive or without conditioning; weights of that variant have no correct reading.",
        )
    conditioning: Conditioning = "none"
    embeddings = [state[key] for key in _sorted(state, r"score_embed\.(?:(\d+)\.)?weight")]
    if embeddings:
        conditioning = "add"
        wanted = autoencoder.latent_channels * autoencoder.latent_size**2
        if any(embedding.shape[1] != wanted for embedding in embeddings):
            raise UsageError(f"score_embed has {embeddings[0].shape[1]} values per bin; the latent has {wanted}.")
    values = autoencoder.to_dict() | {
        "conditioning": conditioning,
        "quality_bins": [len(embedding) for embedding in embeddings] or [10],
        "transformer_width": state["position_emb"].shape[1],
        "transformer_heads": heads,
        "transformer_layers": len(_sorted(state, r"ft_layers\.(\d+)\.norm1\.weight")),
        "connect_sizes": [
            int(key.split(".")[1]) for key in _sorted(state, r"fuse_convs_dict\.(\d+)\.scale\.0\.weight")
        ],
    }
    return NetworkConfig.from_dict(values)


def _sorted(state: State, pattern: str) -> list[str]:
    """Keys that match ``pattern``, in the order of the number in it."""
    found = [match for key in state if (match := re.fullmatch(pattern, key))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1] or 0))]


def _check(state: State, config: NetworkConfig, path: str) -> None:
    """Compare with the network of ``config``, tensor by tensor."""
    network = build(config, device="meta")
    wanted = network.autoencoder_state() if is_autoencoder_only(state) else network.state_dict()
    faults = [f"{key} is missing" for key in wanted if key not in state]
    faults += [f"{key} is unknown" for key in state if key not in wanted]
    faults += [
        f"{key} has shape {list(state[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if faults:
        raise UsageError(
            f"{path} does not fit the network that its keys describe: {'; '.join(faults[:4])}"
            f"{f' and {len(faults) - 4} more' if len(faults) > 4 else ''}.",
            "Give a checkpoint of CodeFormer or IQPIR in the published layout.",
        )
