"""What stages have in common: freezing, code counts, preview pictures."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from iqpir.losses import to_unit_range
from iqpir.networks.codebook import CodebookStatistics
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.training.distributed import Distributed
from iqpir.training.state import TrainState

BOOKS = ("common", "hq")


def freeze_except(network: RestorationNetwork, trained: Collection[str]) -> None:
    """Let only the parameters of the direct parts named ``trained`` require a gradient."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in trained)


@torch.no_grad()
def count_codes(state: TrainState, codes: Tensor, gate: Tensor | None = None) -> None:
    """Add ``codes`` (int64 [B,C,h,h]) to the counts of ``state``; HQ+ codes only where ``gate`` (bool [B]).

    Waits for nothing: unlike ``bincount`` a scatter knows its size.
    """
    for book, name in enumerate(BOOKS[: codes.shape[1]]):
        flat = codes[:, book].flatten(1)
        size = state.network.config.codebook_size
        counts = state.code_counts.setdefault(name, torch.zeros(size, dtype=torch.int64, device=codes.device))
        ones = torch.ones_like(flat) if gate is None or book == 0 else gate[:, None].expand_as(flat).long()
        counts.scatter_add_(0, flat.flatten(), ones.flatten())


def code_health(state: TrainState, distributed: Distributed) -> dict[str, float]:
    """``common_usage``, ``common_perplexity``, ``common_dead`` and the same of ``hq`` since the last call."""
    facts: dict[str, float] = {}
    for name, counts in state.code_counts.items():
        shares = distributed.mean(counts.double())
        for fact, value in CodebookStatistics.of(shares)._asdict().items():
            facts[f"{name}_{fact}"] = float(value)
    state.code_counts.clear()
    return facts


def montage(rows: Sequence[Tensor]) -> Tensor:
    """Rows of pictures (each [B,3,R,R] in [-1,1]) one below the other: [rows*R, B*R, 3] uint8 on the CPU."""
    lines = [torch.cat(list(to_unit_range(pictures)), dim=2) for pictures in rows]
    whole = torch.cat(lines, dim=1).permute(1, 2, 0)
    return (whole * 255.0).round().to(torch.uint8).cpu()
