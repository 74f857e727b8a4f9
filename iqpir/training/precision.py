"""Number formats, memory layout and compilation: speed switches that change no formula."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """How a step is computed."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: convolutions and matrix products in bfloat16; losses, codes and weights stay float32."""
    channels_last: bool = False
    """Lay pictures, features and weights out NHWC, which tensor cores prefer."""
    compile: bool = False
    """Compile each block of the networks on its first use (regional compilation)."""
    tf32: bool = False
    """Let float32 matrix products of an NVIDIA GPU use TF32."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which a network runs on ``device``."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


FP32 = PrecisionConfig()
"""Plain float32."""

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def prepare(network: NetworkT, config: PrecisionConfig) -> NetworkT:
    """Apply layout and compilation to ``network`` in place and return it. State-dict keys do not change.

    Blocks are compiled, not the whole: they repeat, so few graphs are built, and every restart pays less.
    With ``tf32`` this sets torch's global switch.
    """
    if config.channels_last:
        # nn.Module.to has no typed overload for memory_format alone.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if config.compile:
        for block in compiled_blocks(network):
            block.compile(dynamic=False)
    return network


def compiled_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks that ``prepare`` compiles: members of containers that have parts of their own."""
    return [
        block
        for stack in network.modules()
        if isinstance(stack, nn.ModuleList | nn.ModuleDict)
        for block in stack.children()
        if any(True for _ in block.children())
    ]
