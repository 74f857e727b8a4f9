"""How much of the machine a training uses: floating-point operations, the device's peak, memory."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "B200": 2250e12,
    "B100": 1800e12,
}
"""Dense bfloat16 operations a second by a part of the device's name, the longest that fits (NVIDIA's data sheets)."""


def counted(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns, and its floating-point operations: matrix products and convolutions, both directions.

    It runs once, and uncompiled: compiled kernels cannot be counted. Its last bits may be others than without
    counting, so do not count where a training goes on.
    """
    compiling = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it takes seconds
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    with eager, FlopCounterMode(display=False) as counter:
        result = work()
    return result, float(counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second of a GPU; None where they are not known, and on a CPU."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """As ``peak_flops``, by the name of a GPU."""
    words = name.replace("-", " ").split()
    fits = [part for part in PEAK_FLOPS if all(word in words for word in part.split())]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None


def resident_gib() -> float | None:
    """Memory of this process that is in RAM now, in GiB; None where the system does not say (no /proc)."""
    facts = Path("/proc/self/statm")
    if not facts.exists():
        return None
    return int(facts.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
