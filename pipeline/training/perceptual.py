"""The perceptual term of the reconstruction losses, by name; a name that cannot be had is an error, not another."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.losses import ms_ssim_loss
from pipeline.torchvision_ops import ensure_torchvision_operators

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(restored, wanted), both [B,3,H,W] in [-1,1] -> 0-d loss, 0 for equal pictures."""


OWN: dict[str, Perceptual] = {"ms_ssim": ms_ssim_loss, "ssim": partial(ms_ssim_loss, scales=1)}
"""Terms without weights or pyiqa, for any size (pyiqa's ms_ssim needs pictures of 176 pixels or more)."""


def pyiqa_name(term: str) -> str:
    """What pyiqa calls a term: its plain ``lpips`` has AlexNet's features, the published loss has VGG's."""
    return "lpips-vgg" if term == "lpips" else term


def perceptual_term(name: str, weight: float, device: torch.device | None = None) -> Perceptual | None:
    """The term called ``name``, or None for ``none``.

    Args:
        name: ``ms_ssim`` or ``ssim`` (ours, any size), ``lpips`` (VGG's features, as published) or another
            full-reference metric of pyiqa that gives gradients, or ``none``.
        weight: its weight in the stage's configuration.
        device: where it runs.

    Raises:
        UsageError: an unknown name, weights that are not at hand, or a weight without a term.
    """
    if name == "none" or weight == 0:
        if name == "none" and weight > 0:
            raise UsageError(f"perceptual is none and stage.perceptual_weight is {weight}.", "Set the weight to 0.")
        return None
    if name in OWN:
        return OWN[name]
    ensure_torchvision_operators()
    import pyiqa
    from pyiqa import list_models

    if name not in list_models(metric_mode="FR"):
        raise UsageError(
            f"Unknown perceptual term {name!r}.", "Choose lpips, ms_ssim, ssim, another of pyiqa, or none."
        )
    try:
        metric = pyiqa.create_metric(pyiqa_name(name), device=device or torch.device("cpu"), as_loss=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"The weights of the perceptual term {name} are not at hand: {str(error).splitlines()[0]}",
            "Put them where pyiqa looks (docs/metrics.md), or choose a term without weights: ms_ssim, ssim.",
        ) from error
    lower_better = bool(metric.lower_better)

    def term(restored: Tensor, wanted: Tensor) -> Tensor:
        unit = ((restored + 1) / 2).clamp(0, 1), ((wanted + 1) / 2).clamp(0, 1)
        value: Tensor = metric(*unit).mean()
        return value if lower_better else 1.0 - value

    return term
