"""The differentiable quality prior: a rank network of our own, calibration maps, and their ensemble.

The rank network learns from ordered distortions alone (RankIQA, Liu et al., ICCV 2017, arXiv 1707.08347):
no human opinion and no other network enters it. The ensemble is the paper's quality S, the mean of n
calibrated scores, made fit for a loss: every metric in it must give a gradient to the picture.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from iqpir.errors import UsageError

RANK_NETWORKS = ("rank", "rank_judge")
"""``rank`` is the prior; ``rank_judge``, of other pictures and widths, judges what ``rank`` steered."""

RANK_FACTS = "rank_network"
"""Metadata key of a weight file: JSON with the widths, and the data, licence and seed of the training."""

_WEIGHTS = Path(__file__).parent / "weights"
_FILES = {"rank": "rank_quality.safetensors", "rank_judge": "rank_judge.safetensors"}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the identity; size and channels stay."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,h,w]."""
        hidden: Tensor = self.second(functional.silu(self.first(functional.silu(features))))
        return features + hidden


class RankNetwork(nn.Module):
    """Picture -> score, higher is better; fully convolutional, for any size from 32x32 on.

    A score and a positive weight are predicted at every eighth pixel (receptive field about 72 pixels) and
    the weighted mean is returned (the pooling of Bosse et al., TIP 2018, arXiv 1612.01697): a large picture
    is judged as the crops it consists of, so training on small crops carries over to any size.
    No normalisation layer: a score depends on its own picture only, never on the batch.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int] = (32, 64, 96)) -> None:
        """Args: widths: channels at a half, a quarter and an eighth of the resolution."""
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = [nn.Conv2d(6, widths[0], 4, stride=2, padding=1), ResidualBlock(widths[0])]
        for narrow, wide in pairwise(widths):
            layers += [nn.SiLU(), nn.Conv2d(narrow, wide, 3, stride=2, padding=1), ResidualBlock(wide)]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(widths[-1], 64, 1), nn.SiLU(), nn.Conv2d(64, 2, 1))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """Score of each picture.

        Args:
            pictures: [B,3,H,W] in [0,1], RGB; H and W at least 32.

        Returns:
            [B]; about 0 (worst of the training distortions) to 1 (undistorted), not clamped.
        """
        # Fine detail is small beside the large tones; as an input of its own it is seen from the first step.
        detail = pictures - functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
        maps = self.head(self.trunk(torch.cat([(pictures - 0.5) * 4.0, detail * 16.0], dim=1)))
        weights = functional.softplus(maps[:, 1]) + 1e-3
        pooled: Tensor = (maps[:, 0] * weights).sum((1, 2)) / weights.sum((1, 2))
        return (pooled - self.offset) * self.scale


def load_rank_network(name: str = "rank", device: str | torch.device = "cpu") -> RankNetwork:
    """A trained rank network, frozen and in evaluation mode.

    Args:
        name: one of ``RANK_NETWORKS``, or the path of a file that ``jobs/fit_metric.py`` wrote.
        device: where the weights go.

    Raises:
        UsageError: there is no such network or file.
    """
    path = _WEIGHTS / _FILES[name] if name in _FILES else Path(name)
    if not path.is_file():
        raise UsageError(
            f"There is no rank network {name!r} ({path}).",
            f"Choose among {', '.join(RANK_NETWORKS)}, or train one with jobs/fit_metric.py.",
        )
    with safe_open(str(path), framework="pt", device="cpu") as file:
        facts = json.loads(file.metadata()[RANK_FACTS])
    state = load_file(path)
    network = RankNetwork(facts["widths"])
    network.load_state_dict(state)
    return network.eval().requires_grad_(False).to(device)


class PiecewiseLinear(nn.Module):
    """A monotone map given by knots, differentiable, defined everywhere.

    Between knots it is linear. Beyond the outermost knots it does not stop: it goes on with the slope of the
    outermost segment and bends hyperbolically towards 0 and 1, which it never reaches. So a picture worse
    than the whole reference set still has a gradient that leads back, one that fades slowly, and an
    out-of-range score has a value strictly inside (0, 1). Where the outermost value is 0 or 1 itself
    (``minmax`` and ``range`` calibrations) there is no room left: the map is constant there, its gradient zero.
    With ``open_ends`` it goes straight on instead, out of [0, 1], as the paper's unclamped minmax does.
    """

    knots: Tensor
    values: Tensor

    def __init__(
        self, knots: Sequence[float] | Tensor, values: Sequence[float] | Tensor, *, open_ends: bool = False
    ) -> None:
        """Keep the map.

        Args:
            knots: strictly increasing scores, 2 or more.
            values: as many numbers in [0, 1], monotone either way.
            open_ends: beyond an outermost value of 0 or 1 go straight on; for losses.

        Raises:
            UsageError: too few knots, lengths that differ, no monotony, or a value outside [0, 1].
        """
        super().__init__()
        x = torch.as_tensor(knots, dtype=torch.float64)
        y = torch.as_tensor(values, dtype=torch.float64)
        if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
            raise UsageError(f"A calibration needs 2 knots or more and as many values; got {len(x)}, {len(y)}.")
        steps = y.diff()
        if not bool((x.diff() > 0).all()) or not bool((steps >= 0).all() or (steps <= 0).all()):
            raise UsageError("A calibration needs strictly increasing knots and monotone values.")
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise UsageError("Calibrated values must lie in [0, 1].")
        self.register_buffer("knots", x)
        self.register_buffer("values", y)
        self.open_ends = open_ends

    def forward(self, scores: Tensor) -> Tensor:
        """Scores of any shape -> values, in [0, 1] unless ends are open, in the scores' dtype (computed in float64)."""
        x = scores.double()
        right_knot = torch.searchsorted(self.knots, x.detach().contiguous())
        segment = (right_knot - 1).clamp(0, len(self.knots) - 2)
        left, right = self.knots[segment], self.knots[segment + 1]
        low, high = self.values[segment], self.values[segment + 1]
        slope = (high - low) / (right - left)
        inside = low + slope * (x.clamp(self.knots[0], self.knots[-1]) - left)
        below = self._tail(self.values[0], slope * (x - self.knots[0]).clamp(max=0.0))
        above = self._tail(self.values[-1], slope * (x - self.knots[-1]).clamp(min=0.0))
        result = torch.where(x < self.knots[0], below, torch.where(x > self.knots[-1], above, inside))
        return result.to(scores.dtype)

    def _tail(self, edge: Tensor, rise: Tensor) -> Tensor:
        """``edge + rise`` for a small rise, bent so that it stays inside (0, 1); constant or straight at 0 and 1."""
        room = 1.0 - edge
        falling = edge / (1.0 - rise.clamp(max=0.0) / edge.clamp(min=1e-12))
        rising = 1.0 - room / (1.0 + rise.clamp(min=0.0) / room.clamp(min=1e-12))
        bent = torch.where(rise < 0, falling, rising)
        return torch.where(edge * room == 0, edge + rise, bent) if self.open_ends else bent


Scorer = Callable[[Tensor], Tensor]
"""[B,3,H,W] in [0,1] -> raw scores [B]."""


class QualityPrior(nn.Module):
    """Quality of pictures as a loss can use it: the mean of calibrated differentiable metrics.

    Modules among the metrics are frozen and put in evaluation mode; the gradient goes to the picture alone.
    """

    def __init__(
        self,
        metrics: Mapping[str, Scorer],
        calibrations: Mapping[str, PiecewiseLinear],
        *,
        max_side: int | None = None,
        bound: Literal["crop", "resize"] = "crop",
        probe_size: int = 64,
    ) -> None:
        """Build the ensemble and prove that each metric, seen through its map, can steer a picture.

        Args:
            metrics: name -> scorer, at least one.
            calibrations: name -> map of the raw score into [0, 1], higher better, for each metric.
            max_side: bound of the cost: larger pictures are cut or shrunk to this side; None: no bound.
            bound: ``crop`` keeps the pixels as they are, ``resize`` keeps the whole picture.
            probe_size: side of the noise picture with which gradients are checked.

        Raises:
            UsageError: no metric, a metric without calibration, one without gradient, or one whose map has no
                gradient beyond its ends (naming it).
        """
        super().__init__()
        if not metrics:
            raise UsageError("A quality prior needs at least one metric.", "For example rank.")
        missing = sorted(set(metrics) - set(calibrations))
        if missing:
            raise UsageError(f"The calibration has no map for {missing}.", "Label the corpus with them first.")
        self.names = tuple(metrics)
        self.max_side = max_side
        self.bound = bound
        self._scorers = dict(metrics)
        # Registered so that .to(device) reaches them; a plain function keeps its own device.
        self.networks = nn.ModuleList(scorer for scorer in metrics.values() if isinstance(scorer, nn.Module))
        self.maps = nn.ModuleList(calibrations[name] for name in self.names)
        self.networks.requires_grad_(False)
        self.train(False)
        self._check_ends(calibrations)
        self._check_gradients(probe_size)

    def train(self, mode: bool = True) -> "QualityPrior":
        """Stays in evaluation mode whatever the surrounding module does: the prior is never trained."""
        return super().train(False)

    def scores(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Calibrated score of each metric, in the order of ``names``: [B,3,H,W] -> [B,n], in [0,1] with closed ends."""
        bounded = self._bounded(pictures, generator)
        columns = [
            calibrate(self._scorers[name](bounded).reshape(-1).float())
            for name, calibrate in zip(self.names, self.maps, strict=True)
        ]
        return torch.stack(columns, dim=1)

    def forward(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Quality of each picture.

        Args:
            pictures: [B,3,H,W] in [0,1].
            generator: places the crop at random; without it the crop is central.

        Returns:
            [B] in [0,1], 1 best; outside where maps have open ends.
        """
        return self.scores(pictures, generator).mean(dim=1)

    def _bounded(self, pictures: Tensor, generator: torch.Generator | None) -> Tensor:
        """The part or the size of ``pictures`` that ``max_side`` allows."""
        height, width = pictures.shape[-2:]
        if self.max_side is None or max(height, width) <= self.max_side:
            return pictures
        if self.bound == "resize":
            ratio = self.max_side / max(height, width)
            size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
            return functional.interpolate(pictures, size, mode="bicubic", align_corners=False, antialias=True).clamp(
                0.0, 1.0
            )
        free = (max(0, height - self.max_side), max(0, width - self.max_side))
        top, left = (
            (room // 2 if generator is None else int(torch.randint(room + 1, (), generator=generator))) for room in free
        )
        return pictures[..., top : top + self.max_side, left : left + self.max_side]

    def _check_ends(self, calibrations: Mapping[str, PiecewiseLinear]) -> None:
        """Raise UsageError naming the first metric whose map is constant beyond an end.

        A picture that is worse than all of the reference set, which is what trainings start from, would stay so.
        """
        for name in self.names:
            mapping = calibrations[name]
            ends = torch.stack([2 * mapping.knots[0] - mapping.knots[1], 2 * mapping.knots[-1] - mapping.knots[-2]])
            with torch.enable_grad():
                beyond = ends.detach().requires_grad_(True)
                (slopes,) = torch.autograd.grad(mapping(beyond).sum(), beyond)
            if not bool(slopes.all()):
                raise UsageError(
                    f"The calibration of {name!r} is constant beyond its ends {mapping.knots[[0, -1]].tolist()}: it "
                    "cannot steer pictures whose score lies there.",
                    "Give outermost values inside (0, 1), or PiecewiseLinear's open_ends.",
                )

    def _check_gradients(self, size: int) -> None:
        """Raise UsageError naming the first metric whose calibrated score does not change with the picture."""
        parameter = next(self.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        for name, calibrate in zip(self.names, self.maps, strict=True):
            with torch.enable_grad():
                picture = noise.to(device).requires_grad_(True)
                score = calibrate(self._scorers[name](picture).reshape(-1).float())
                gradient = torch.autograd.grad(score.sum(), picture)[0] if score.requires_grad else None
            if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
                raise UsageError(
                    f"Metric {name!r} gives no gradient and cannot steer training.",
                    "Choose differentiable metrics, for example rank.",
                )
