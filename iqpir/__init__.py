"""iqpir: image restoration with a learned quality prior, over discrete codebooks.

``import iqpir`` loads nothing heavy; ``iqpir.build``, ``iqpir.Restorer``, ``iqpir.attach_quality_prior`` and
``iqpir.load_quality_prior`` load torch on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iqpir.networks.restoration_network import build as build
    from iqpir.restorer import Restorer as Restorer

__version__ = "0.1.0"
__all__ = ["Restorer", "__version__", "build"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from iqpir.networks.restoration_network import build

        return build
    if name == "Restorer":
        from iqpir.restorer import Restorer

        return Restorer
    if name in ("attach_quality_prior", "load_quality_prior"):
        # Not by an import statement: a registered model carries what this file imports, and has no use for it.
        return getattr(importlib.import_module(f"{__name__}.plug_in.attached_prior"), name)
    raise AttributeError(f"module 'iqpir' has no attribute {name!r}")
