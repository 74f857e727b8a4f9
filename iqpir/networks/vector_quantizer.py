"""Vector quantisation: nearest codes, their vectors, and the losses that teach both sides.

All of it is computed in float32, whatever autocast says: a rounded distance picks another code.
Sources: VQ-VAE (arXiv 1711.00937), rotation trick (arXiv 2410.06424).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from iqpir.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class QuantiserConfig:
    """How a latent learns from its code and a code from its latents."""

    commitment_weight: float = 1.0
    """Weight of the term that pulls the latent towards its code."""
    codebook_weight: float = 0.25
    """Weight of the term that pulls the code towards its latents. VQ-VAE's text has the two weights the other
    way round (beta = 0.25 on the commitment); 0 when moving averages teach the codebook."""
    estimator: Literal["straight_through", "rotation"] = "straight_through"
    """How the decoder's gradient passes the quantiser: copied, or rotated with the code."""

    def __post_init__(self) -> None:
        if self.commitment_weight < 0 or self.codebook_weight < 0:
            raise UsageError(
                f"commitment_weight {self.commitment_weight} and codebook_weight {self.codebook_weight} "
                "must not be negative."
            )


PUBLISHED = QuantiserConfig()
"""Losses and estimator of the published code."""


class Assignment(NamedTuple):
    """Latents assigned to the codes of one book."""

    latent: Tensor
    """Quantised latent [B,d,h,h]; gradients pass to the latent that was quantised."""
    loss: Tensor
    """Loss per sample [B], float32."""
    codes: Tensor
    """int64 [B,h,h]."""


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on ``device``."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """Exactly ``value``, with the gradient going to ``path`` unchanged."""
    return value.detach() + (path - path.detach())


def rotate_through(value: Tensor, path: Tensor) -> Tensor:
    """``value`` up to rounding, reached from ``path`` by a constant rotation and scaling per vector.

    Both are [B,d,h,h]; the gradient to ``path`` is rotated and scaled with it (arXiv 2410.06424, section 4).
    """
    source, target = path.detach(), value.detach()
    source_norm = source.norm(dim=1, keepdim=True).clamp_min(1e-6)
    target_norm = target.norm(dim=1, keepdim=True)
    start, end = source / source_norm, target / target_norm.clamp_min(1e-6)
    middle = functional.normalize(start + end, dim=1, eps=1e-6)
    along_middle = (middle * path).sum(dim=1, keepdim=True)
    along_start = (start * path).sum(dim=1, keepdim=True)
    rotated = path - 2 * middle * along_middle + 2 * end * along_start
    scaled: Tensor = rotated * (target_norm / source_norm)
    return scaled


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest row of ``codebook`` [K,d] for each of ``rows`` [M,d]: int64 [M]."""
    # |row|^2 is the same for all codes: left out, the comparison keeps more digits.
    distance = torch.addmm(codebook.square().sum(dim=1), rows, codebook.t(), alpha=-2)
    return distance.argmin(dim=1)


def rows_of(latent: Tensor) -> Tensor:
    """[B,d,h,w] -> [B*h*w,d], ordered (sample, row, column)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


class VectorQuantizer(nn.Module):
    """A codebook of ``size`` vectors of ``width``; its one parameter is ``embedding.weight`` [K,d]."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

    @property
    def size(self) -> int:
        """Entries K."""
        return self.embedding.num_embeddings

    def assign(self, latent: Tensor) -> Tensor:
        """Nearest code of each position: [B,d,h,w] -> int64 [B,h,w]."""
        batch, _, height, width = latent.shape
        with torch.no_grad(), full_precision(latent.device):
            codes = nearest(rows_of(latent.float()), self.embedding.weight.float())
        return codes.view(batch, height, width)

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [B,h,w] -> [B,d,h,w]."""
        vectors: Tensor = self.embedding(codes)
        # Left as it lies, it would turn the decoder channels-last, whose group norm is less exact on a CPU.
        return vectors.movedim(-1, 1).contiguous()

    def soft_lookup(self, logits: Tensor, tau: float) -> Tensor:
        """Expected code vector under ``softmax(logits / tau)``: [B,N,K] -> [B,d,h,h], h*h = N."""
        side = round(logits.shape[1] ** 0.5)
        with full_precision(logits.device):
            weights = torch.softmax(logits.float() / tau, dim=-1)
            vectors = weights @ self.embedding.weight.float()
        return vectors.transpose(1, 2).reshape(len(logits), -1, side, side).contiguous()

    def forward(self, latent: Tensor, config: QuantiserConfig) -> Assignment:
        """[B,d,h,w] -> its codes, their vectors with a gradient to ``latent``, and the loss per sample."""
        codes = self.assign(latent)
        with full_precision(latent.device):
            exact = latent.float()
            vectors = self.lookup(codes).float()
            loss = config.commitment_weight * (vectors.detach() - exact).square().mean(dim=(1, 2, 3))
            if config.codebook_weight > 0:
                loss = loss + config.codebook_weight * (vectors - exact.detach()).square().mean(dim=(1, 2, 3))
            through = rotate_through if config.estimator == "rotation" else straight_through
            return Assignment(through(vectors, exact), loss, codes)
