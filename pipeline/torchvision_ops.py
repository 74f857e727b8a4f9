"""Lets torchvision be imported beside a CPU build of torch.

torchvision from PyPI is compiled against the CUDA build of torch. Beside a CPU build its compiled operators
do not load, and its import then fails at ``torchvision::nms``, whose fake kernel it registers. Declaring the
operators it asks for is enough: the package imports and all that is plain torch works; the two operators
themselves raise when they are called.
"""

import importlib.util
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The operators that torchvision's import needs."""

# A declaration lives as long as the library object that made it.
_declared: list[torch.library.Library] = []


def ensure_torchvision_operators() -> None:
    """Declare ``torchvision::nms`` and ``torchvision::qnms`` where torchvision's own do not load.

    Call it before the first import of torchvision. Does nothing when the compiled operators load, when
    torchvision is not installed, and when it is called again.
    """
    if hasattr(torch.ops.torchvision, "nms") or _load_compiled():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _load_compiled() -> bool:
    """Whether torchvision's operators load (and stay loaded), or there is no torchvision to need them."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    for library in sorted(Path(spec.origin).parent.glob("_C.*")):
        try:
            torch.ops.load_library(library)
        except OSError:
            # Compiled for another build of torch: this is the case that the declarations are for.
            continue
        return True
    return False
