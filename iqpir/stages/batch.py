"""What a stage is fed: one rank's part of one global batch."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from iqpir.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one optimisation step, of one rank.

    Slot ``i`` of rank ``r`` is slot ``r * len(batch) + i`` of the global batch.
    """

    hq: Tensor
    """[B, 3, R, R] float in [-1, 1]: the pictures to learn from."""
    quality: Tensor
    """[B] float32 in [0, 1]: calibrated quality of ``hq``; or [B, n], one for each conditioning score."""
    index: Tensor
    """[B] int64: numbers of the samples in the view."""
    flipped: Tensor
    """[B] bool: the sample was mirrored left to right (``hq``, ``lq`` and ``codes`` already are)."""
    lq: Tensor | None = None
    """[B, 3, R, R] float in [-1, 1]: the degraded pictures; stage 1 needs none."""
    codes: Tensor | None = None
    """[B, C, h, h] int64: precomputed codes of ``hq``, C = 1 (common) or 2 (common, HQ+)."""

    @property
    def degraded(self) -> Tensor:
        """``lq``, for stages that cannot do without.

        Raises:
            UsageError: the batch has none.
        """
        if self.lq is None:
            raise UsageError("This stage needs degraded pictures.", "Configure a degradation.")
        return self.lq

    def __len__(self) -> int:
        return self.hq.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``; copies are asynchronous where the source memory is pinned."""
        present = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        moved = {name: value.to(device, non_blocking=True) for name, value in present.items()}
        return replace(self, **moved)
