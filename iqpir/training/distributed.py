"""Ranks: what the loop and the stages need of ``torch.distributed``, and the same with one process."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iqpir.errors import PermanentError


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """The ranks of one training. With ``world_size`` 1 every collective is the identity.

    A launcher (torchrun, Ray, a test) initialises the process group; this class only uses it.
    """

    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """Number of processes that train together."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this rank computes."""

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> "Distributed":
        """The ranks of the initialised default process group, or one process without it."""
        place = torch.device(device)
        if dist.is_available() and dist.is_initialized():
            return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=place)
        return cls(device=place)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes checkpoints and metrics."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size == 1:
            return
        if self.device.type == "cuda":
            # A bare barrier guesses the device from the rank and can hang on the wrong one.
            dist.barrier(device_ids=[self.device.index or 0])
        else:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Mean of ``value`` over ranks, as a new tensor of the same shape."""
        if self.world_size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def maximum(self, value: Tensor) -> Tensor:
        """Element-wise maximum of ``value`` over ranks, as a new tensor of the same shape."""
        if self.world_size == 1:
            return value
        result = value.detach().clone()
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return result

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank. Synchronises the device."""
        if self.world_size == 1:
            return flag
        return bool(self.maximum(torch.tensor(int(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, in rank order, on every rank. For small objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def synchronise(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers of ``module``, in place."""
        if self.world_size == 1:
            return
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)

    def require_equal(self, fingerprint: int, what: str) -> None:
        """Prove that every rank has the same ``fingerprint``.

        Raises:
            PermanentError: on every rank, naming ``what``, when ranks differ.
        """
        seen = self.gather(fingerprint)
        if len(set(seen)) > 1:
            raise PermanentError(
                f"Ranks disagree about {what}: {seen}.",
                "Go back to the last checkpoint; report this, ranks must never drift apart.",
            )

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with gradients averaged over ranks; unchanged with one process or nothing to train.

        Every parameter of ``module`` that requires a gradient must get one in each backward pass.
        """
        if self.world_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # Codebooks are synchronised by their owner; copying rank 0's buffers at each forward would hide drift.
        # Running statistics of a discriminator with batch norm stay each rank's own: no training reads them.
        # torch 2.13 renamed the switch.
        names = inspect.signature(DistributedDataParallel.__init__).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {switch: False}
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **options,
        )


SINGLE = Distributed()
"""One process, on the CPU."""
