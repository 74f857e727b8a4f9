"""iqpir: image restoration with a learned quality prior, over discrete codebooks.

``import iqpir`` loads nothing heavy; ``iqpir.build`` and ``iqpir.Restorer`` load torch on first use.
"""

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
    raise AttributeError(f"module 'iqpir' has no attribute {name!r}")
