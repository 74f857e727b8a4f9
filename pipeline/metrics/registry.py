"""The registry: what a metric is, which ones there are, and which of them may be used.

Three are embedded and need no download: ``rank`` and ``rank_judge`` (networks of this project), ``piqe`` and
``niqe`` (computed by pyiqa). Every other no-reference metric of pyiqa goes by its pyiqa name. Packages add
their own through the entry point group ``iqpir.metrics``: each entry loads to a ``Metric``.
"""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from iqpir.errors import UsageError
from iqpir.quality_prior import RANK_NETWORKS, load_rank_network
from pipeline.metrics import pyiqa_adapter
from pipeline.metrics.small_pictures import Enlarged, Enlargement

Scorer = Callable[[Tensor], Tensor]
"""Pictures [B,3,H,W] in [0,1] -> raw scores [B]. Whether gradients are kept the caller decides."""

ENTRY_POINTS = "iqpir.metrics"
OUR_LICENCE = "Apache-2.0 (weights from CID22, CC BY-SA 4.0)"


class ScorerFactory(Protocol):
    """Builds a scorer; reads weights, never the network."""

    def __call__(self, device: str | torch.device, weights_uri: str | None = None) -> Scorer:
        """The scorer on ``device``; ``weights_uri`` is a mirror of weight files. UsageError: no weights."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A no-reference metric and everything that a score's provenance needs."""

    name: str
    version: str
    """Changes when the same picture may get another score."""
    direction: Literal["higher", "lower"]
    """Which end is the better one."""
    differentiable: bool
    """Whether the picture gets a gradient."""
    licence: str
    commercial: bool
    """Whether that licence allows commercial use."""
    score_range: tuple[float, float] | None = None
    """Nominal worst-to-best or best-to-worst interval, low end first; scores may leave it."""
    batchable: bool = False
    """Whether a score is known not to depend on the other pictures of its batch; else batches hold one."""
    min_side: int = 1
    """Smaller pictures are enlarged to this side by the scorer, in the manner ``enlargement``."""
    enlargement: Enlargement = "bicubic"
    scorer: ScorerFactory

    def facts(self) -> dict[str, str | int | bool | list[float] | None]:
        """What decides a score, as JSON values; part of its fingerprint."""
        return {
            "name": self.name,
            "version": self.version,
            "direction": self.direction,
            "licence": self.licence,
            "score_range": None if self.score_range is None else list(self.score_range),
            "batchable": self.batchable,
            "min_side": self.min_side,
            "enlargement": self.enlargement,
        }


def find_metrics(names: Sequence[str], *, commercial_safe: bool = False) -> list[Metric]:
    """The metrics called ``names``, in that order. Builds nothing.

    Args:
        names: embedded names, names of entry points, names of pyiqa.
        commercial_safe: refuse those whose licence forbids commercial use.

    Raises:
        UsageError: an unknown name (with the nearest known ones), a double one, or a refused licence.
    """
    if not names or len(set(names)) != len(names):
        raise UsageError(f"metrics {list(names)} is empty or names one twice.")
    metrics = [_find(name) for name in names]
    refused = [metric for metric in metrics if commercial_safe and not metric.commercial]
    if refused:
        listing = "; ".join(f"{metric.name}: {metric.licence}" for metric in refused)
        raise UsageError(
            f"commercial_safe refuses {listing}.",
            f"Use {', '.join(RANK_NETWORKS)} or metrics of your own (entry points {ENTRY_POINTS}).",
        )
    return metrics


def scorer_digest(scorer: Scorer) -> str:
    """64 hex digits over all tensors of a scorer (parameters, buffers, plain attributes); "" without any."""
    tensors = _tensors(scorer)
    if not tensors:
        return ""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def scorer_dtypes(scorer: Scorer) -> str:
    """Number types that a scorer computes with, such as ``float32`` or ``float16, float32``; pictures are float32."""
    found = {value.dtype for value in _tensors(scorer).values() if value.dtype.is_floating_point}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found or {torch.float32}))


def _tensors(scorer: Scorer) -> dict[str, Tensor]:
    """All tensors of a scorer by their place in it."""
    if not isinstance(scorer, nn.Module):
        return {}
    return {
        f"{path}.{name}": value
        for path, module in scorer.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if isinstance(value, Tensor) and value.numel()
    }


def _find(name: str) -> Metric:
    """One metric, by the first source that knows it."""
    if name in RANK_NETWORKS:
        return _rank(name)
    if name in pyiqa_adapter.EMBEDDED:
        return _from_pyiqa(name, pyiqa_adapter.EMBEDDED[name])
    plugins = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}
    if name in plugins:
        found = plugins[name].load()
        if not isinstance(found, Metric) or found.name != name:
            raise UsageError(f"Entry point {name!r} of group {ENTRY_POINTS} is no Metric of that name.")
        return found
    known = pyiqa_adapter.no_reference_metrics()
    if name in known:
        return _from_pyiqa(name, known[name])
    everything = sorted({*RANK_NETWORKS, *pyiqa_adapter.EMBEDDED, *plugins, *known})
    close = difflib.get_close_matches(name, everything, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(everything)}."
    missing = "" if known else " pyiqa is not installed: its metrics come with the extra `iqa`."
    raise UsageError(f"Unknown metric {name!r}.", hint + missing)


def _rank(name: str) -> Metric:
    """A rank network of this project: trained on 32 to 128 pixels, applied at native resolution."""

    def build(device: str | torch.device, weights_uri: str | None = None) -> Scorer:
        # Channels last: a quarter faster on a CPU.
        network = load_rank_network(name, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Enlarged(network, 32, "mirror")

    return Metric(
        name=name,
        version="1",
        direction="higher",
        differentiable=True,
        licence=OUR_LICENCE,
        commercial=True,
        score_range=(0.0, 1.0),
        batchable=True,
        min_side=32,
        enlargement="mirror",
        scorer=build,
    )


def _from_pyiqa(name: str, facts: pyiqa_adapter.PyiqaFacts) -> Metric:
    """A metric that pyiqa computes."""

    def build(device: str | torch.device, weights_uri: str | None = None) -> Scorer:
        return Enlarged(pyiqa_adapter.build(name, device, weights_uri), facts.min_side, facts.enlargement)

    return Metric(
        name=name,
        version=f"pyiqa {pyiqa_adapter.version()}",
        direction="lower" if facts.lower_better else "higher",
        differentiable=facts.differentiable,
        licence=pyiqa_adapter.LICENCE,
        commercial=False,
        score_range=facts.score_range,
        batchable=facts.batchable,
        min_side=facts.min_side,
        enlargement=facts.enlargement,
        scorer=build,
    )
