"""Operations are counted exactly, peaks are found by a GPU's name."""

import pytest
import torch
from torch import nn

from iqpir.training.throughput import counted, peak_flops, peak_of, resident_gib


def test_operations_of_a_forward_and_a_backward_pass_are_counted() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3))

    def step() -> torch.Tensor:
        loss = network(torch.ones(2, 3, 16, 16)).square().mean()
        loss.backward()
        return loss.detach()

    loss, flops = counted(step)
    first, second = (2 * 2 * 8 * 3 * 9 * 14**2, 2 * 2 * 4 * 8 * 9 * 12**2)
    assert flops == 3 * (first + second) - first  # nothing asks for a gradient of the pictures
    assert torch.allclose(loss, step())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_named_gpu(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_cpu_has_no_peak_and_a_process_some_memory() -> None:
    assert peak_flops(torch.device("cpu")) is None
    before = resident_gib()
    if before is None:
        pytest.skip("this system has no /proc")
    held = torch.ones(2**26)
    after = resident_gib()
    assert after is not None and after - before == pytest.approx(held.nbytes / 2**30, rel=0.1)
