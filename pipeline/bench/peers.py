"""Where the plain implementations come from: the tests of a checkout, loaded by path."""

import importlib.util
from pathlib import Path
from types import ModuleType

from iqpir.errors import UsageError

FOLDER = Path(__file__).parents[2] / "tests" / "bench"


def peer(name: str) -> ModuleType:
    """The module ``tests/bench/NAME.py``.

    Raises:
        UsageError: this is no checkout.
    """
    path = FOLDER / f"{name}.py"
    if not path.is_file():
        raise UsageError(f"The peer {path} is not there.", "Run bench in a checkout of the repository.")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"The peer {path} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
