"""The tiny training that these tests share."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_FILE = Path(__file__).parent / "training" / "tiny_training.py"


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module ``tiny_training``."""
    if "tiny_training" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tiny_training", _FILE)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["tiny_training"] = module
        spec.loader.exec_module(module)
    return sys.modules["tiny_training"]
