"""Codes as targets, shared by stages 2 and 3: where they come from, and the losses against them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.losses import code_loss, feature_loss
from iqpir.networks.conditioning import consensus
from iqpir.networks.outcomes import Prediction
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.stages.batch import Batch
from iqpir.stages.telemetry import BOOKS


@dataclass(frozen=True, kw_only=True)
class CodeLossConfig:
    """Weights of the losses against the right codes."""

    feature_weight: float = 1.0
    """Weight of L_feat, the squared distance of latents to the vectors of the right codes."""
    feature_on: Literal["conditioned", "raw"] = "conditioned"
    """Compare the latent with the quality map added (published code), or the encoder's own."""
    code_weight: float = 0.5
    """Weight of the cross-entropy of each codebook."""

    def __post_init__(self) -> None:
        if min(self.feature_weight, self.code_weight) < 0:
            raise UsageError("feature_weight and code_weight must not be negative.")


def target_codes(batch: Batch, network: RestorationNetwork, teacher: RestorationNetwork | None) -> Tensor:
    """Codes of ``batch.hq``, int64 [B,C,h,h]: precomputed, or made by the frozen stage-1 ``teacher``.

    Raises:
        UsageError: neither is there, or the codes are of another number of codebooks or size.
    """
    if batch.codes is None:
        if teacher is None:
            raise UsageError(
                "The batch has no codes and there is no stage-1 network to make them.",
                "Encode the view first, or give the stage-1 checkpoint; random targets teach nothing.",
            )
        return teacher.encode_codes(batch.hq)
    side = network.config.latent_size
    if batch.codes.shape[1:] != (network.books, side, side):
        raise UsageError(
            f"Codes have shape {list(batch.codes.shape)}, not [B, {network.books}, {side}, {side}].",
            "Encode the view with the stage-1 checkpoint of this network.",
        )
    return batch.codes


def code_losses(
    network: RestorationNetwork,
    predicted: Prediction,
    codes: Tensor,
    quality: Tensor,
    weights: Tensor,
    config: CodeLossConfig,
) -> dict[str, Tensor]:
    """Weighted L_feat and cross-entropy of each codebook, 0-d.

    Args:
        network: gives the codes' vectors.
        predicted: logits and latents in float32.
        codes: the right ones, int64 [B,C,h,h].
        quality: of the samples the codes are of; with ``hq_gate="paper"`` a sample that is not above
            the threshold has no HQ+ part in its target and no HQ+ cross-entropy.
        weights: [B] of the samples; sums are divided by B.
        config: weights of the losses.
    """
    latent = predicted.latent if config.feature_on == "conditioned" else predicted.raw_latent
    with torch.no_grad():
        target = network.lookup(codes, quality)
    losses = {
        "feature_loss": config.feature_weight * feature_loss(latent, target, weights),
        "common_code_loss": config.code_weight * code_loss(predicted.common, codes[:, 0], weights),
    }
    if network.books == 2:
        if network.config.hq_gate == "paper":
            weights = weights * (consensus(quality) > network.config.hq_threshold)
        losses["hq_code_loss"] = config.code_weight * code_loss(predicted.hq, codes[:, 1], weights)
    return losses


@torch.no_grad()
def accuracies(found: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Share of right codes of each codebook; both arguments int64 [B,C,h,h]."""
    right = (found == codes).float().mean(dim=(0, 2, 3))
    return {f"{name}_accuracy": right[book] for book, name in enumerate(BOOKS[: len(right)])}


def require_same_codebooks(teacher: RestorationNetwork, network: RestorationNetwork) -> None:
    """Prove that the teacher's codes mean the same in ``network``.

    Raises:
        UsageError: a codebook differs.
    """
    own = {key: value for key, value in network.state_dict().items() if key.startswith("quantize")}
    given = {key: value for key, value in teacher.state_dict().items() if key.startswith("quantize")}
    if own.keys() != given.keys() or any(not torch.equal(own[k].cpu(), given[k].cpu()) for k in own):
        raise UsageError(
            "The stage-1 network that makes codes has other codebooks than the network to train.",
            "Load both from the same stage-1 checkpoint.",
        )
