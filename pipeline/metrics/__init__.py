"""Quality metrics: the registry, the ones embedded here, and the adapter to pyiqa's.

``find_metrics(names)`` is the one door; a scorer takes pictures ``[B,3,H,W]`` in [0,1] and returns ``[B]``.
"""

from pipeline.metrics.registry import Metric, Scorer, find_metrics, scorer_digest, scorer_dtypes

__all__ = ["Metric", "Scorer", "find_metrics", "scorer_digest", "scorer_dtypes"]
