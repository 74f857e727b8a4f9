"""torchvision imports beside any build of torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iqpir
from pipeline.torchvision_ops import SCHEMAS, ensure_torchvision_operators


@pytest.mark.slow
def test_torchvision_imports_in_a_fresh_process() -> None:
    program = (
        "from pipeline.torchvision_ops import ensure_torchvision_operators as ensure\n"
        "ensure(); ensure()\n"
        "import torchvision\n"
        "print(torchvision.transforms.functional.resize.__name__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(iqpir.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "resize\n", done.stderr


def test_the_operators_are_declared_once_and_for_all() -> None:
    ensure_torchvision_operators()
    ensure_torchvision_operators()
    for schema in SCHEMAS:
        name = schema.split("(")[0]
        declared = getattr(torch.ops.torchvision, name).default._schema
        assert str(declared).startswith(f"torchvision::{name}(Tensor dets, Tensor scores")
