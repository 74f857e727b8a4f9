"""Every loss of the method, each one pure function.

Pictures are [B,3,H,W] in [-1,1] unless a name says otherwise; results are 0-d float32.
Sources: IQPIR (arXiv 2603.29773), CodeFormer (arXiv 2206.11253), VQGAN (arXiv 2012.09841).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(restored, wanted), both [B,3,H,W] in [-1,1] -> 0-d distance, differentiable in the first."""


def to_unit_range(pictures: Tensor) -> Tensor:
    """Pictures in about [-1,1] -> float32 in [0,1], clamped."""
    return ((pictures.float() + 1.0) * 0.5).clamp(0.0, 1.0)


def pixel_loss(restored: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference."""
    return functional.l1_loss(restored.float(), wanted.float())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Adversarial loss of the generator: minus the mean of the discriminator's logits (any shape)."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator: mean relu(1 - real) + mean relu(1 + fake)."""
    real = functional.relu(1.0 - real_logits.float()).mean()
    return real + functional.relu(1.0 + fake_logits.float()).mean()


def adversarial_weight(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, largest: float, scale: float
) -> Tensor:
    """How much of the adversarial loss to add: ``clamp(|g_rec| / (|g_adv| + 1e-4), 0, largest) * scale``.

    Source: VQGAN, equation 7; both gradients are those of the last layer's weight.
    """
    reconstruction = torch.linalg.vector_norm(reconstruction_gradient)
    adversarial = torch.linalg.vector_norm(adversarial_gradient)
    weight: Tensor = (reconstruction / (adversarial + 1e-4)).clamp(0.0, largest) * scale
    return weight.detach()


def feature_loss(latent: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of latents to the latents of the right codes (IQPIR's L_feat).

    Args:
        latent: [B,d,h,h], gets the gradient.
        target: [B,d,h,h], gets none.
        weights: [B]; the weighted sum over samples is divided by B.
    """
    per_sample = (target.detach().float() - latent.float()).square().mean(dim=(1, 2, 3))
    return (per_sample * weights).mean()


def code_loss(logits: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of predicted codes, mean over tokens.

    Args:
        logits: [B,N,K].
        codes: int64 [B,h,h], h*h = N.
        weights: [B]; the weighted sum over samples is divided by B.
    """
    per_token = functional.cross_entropy(logits.float().transpose(1, 2), codes.flatten(1), reduction="none")
    return (per_token.mean(dim=1) * weights).mean()


def quality_loss(quality: Tensor, wanted: Tensor | None = None) -> Tensor:
    """How far restored pictures are from the wanted quality.

    Args:
        quality: [B], or [B,n] of n metrics, in [0,1], differentiable: what the quality prior says of restored pictures.
        wanted: of the same shape, in [0,1]: mean |quality - wanted|. None: minus the mean quality, as in the paper.
    """
    if wanted is None:
        return -quality.mean()
    return functional.l1_loss(quality, wanted)


def anchor_loss(restored: Tensor, wanted: Tensor) -> Tensor:
    """How far dialled pictures are from what they show: mean absolute difference plus 1 - SSIM."""
    return pixel_loss(restored, wanted) + ms_ssim_loss(restored, wanted, scales=1)


def ms_ssim_loss(restored: Tensor, wanted: Tensor, scales: int = 5) -> Tensor:
    """1 - multi-scale structural similarity: a perceptual loss without a network.

    An 11x11 Gaussian window of deviation 1.5 on [0,1] pictures; as many of the five scales as the
    picture has room for, their weights normalised to 1 (Wang et al., 2003).
    """
    first, second = to_unit_range(restored), to_unit_range(wanted)
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333], device=first.device)
    fitting = max(1, min(scales, (min(first.shape[-2:]) // 11).bit_length()))
    weights = weights[:fitting] / weights[:fitting].sum()
    similarity = torch.ones(len(first), device=first.device)
    for scale in range(fitting):
        luminance, structure = _ssim_terms(first, second)
        term = luminance * structure if scale == fitting - 1 else structure
        # A negative structure has no real power; such patches count as unlike.
        similarity = similarity * term.mean(dim=(1, 2, 3)).clamp_min(1e-6) ** weights[scale]
        if scale < fitting - 1:
            first, second = functional.avg_pool2d(first, 2), functional.avg_pool2d(second, 2)
    return 1.0 - similarity.mean()


def _ssim_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure maps of SSIM (K1 0.01, K2 0.03), each [B,3,H-10,W-10] or whole."""
    offsets = torch.arange(11, device=first.device, dtype=torch.float32) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    channels = first.shape[1]

    def blurred(values: Tensor) -> Tensor:
        rows = functional.conv2d(values, window.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)
        return functional.conv2d(rows, window.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)

    mean1, mean2 = blurred(first), blurred(second)
    variance1 = blurred(first.square()) - mean1.square()
    variance2 = blurred(second.square()) - mean2.square()
    covariance = blurred(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + 0.01**2) / (mean1.square() + mean2.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance1 + variance2 + 0.03**2)
    return luminance, structure
