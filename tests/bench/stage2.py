"""A step of stage 2 as the published dual-codebook training does it: plain float32, a loop over parameters.

The codes of the good picture come from the encoder of stage 1 in every step, and the predicted codes are decoded
to a picture in every step, although no loss looks at it before the quality loss starts.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional

from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.stages.batch import Batch
from iqpir.stages.stage2 import TRAINED, Stage2Config


class Loop:
    """Network, frozen stage 1, optimiser and the averaged copy."""

    def __init__(self, network: RestorationNetwork, teacher: RestorationNetwork, config: Stage2Config) -> None:
        self.network, self.teacher, self.config = network, teacher, config
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in TRAINED)
        self.average = copy.deepcopy(network).requires_grad_(False)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.Adam(trained, lr=1e-4, betas=(0.9, 0.99), foreach=False)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """The optimiser once; the values of the losses."""
        self.optimiser.zero_grad()
        common, hq = self._codes(batch.hq)
        predicted = self.network.predict(batch.degraded, batch.quality)
        chosen = self._vectors(predicted.common.argmax(-1), predicted.hq.argmax(-1))
        self.picture = self.network.generator(predicted.latent + (chosen - predicted.latent).detach())
        losses = {
            "feature_loss": (self._vectors(common, hq).detach() - predicted.latent).square().mean(),
            "common_code_loss": 0.5 * functional.cross_entropy(predicted.common.transpose(1, 2), common),
            "hq_code_loss": 0.5 * functional.cross_entropy(predicted.hq.transpose(1, 2), hq),
        }
        loss = sum(losses.values(), torch.zeros(()).to(batch.hq.device))
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.mul_(self.config.ema_decay).add_(parameter, alpha=1 - self.config.ema_decay)
        return {**{name: value.detach() for name, value in losses.items()}, "loss": loss.detach()}

    @torch.no_grad()
    def _codes(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest vector of each book for each token: int64 [B, N]."""
        latent = self.teacher.encoder(pictures)[0].flatten(2).transpose(1, 2)
        books = (self.teacher.quantize.embedding.weight, self.teacher.quantize_aesthetic.embedding.weight)
        squared = latent.square().sum(-1, keepdim=True)
        common, hq = ((squared + book.square().sum(-1) - 2 * latent @ book.T).argmin(-1) for book in books)
        return common, hq

    def _vectors(self, common: Tensor, hq: Tensor) -> Tensor:
        """Codes [B, N] -> fused latent [B, d, h, h]."""
        network, side = self.network, self.network.config.latent_size
        fused = network.quantize.embedding(common) + network.config.alpha * network.quantize_aesthetic.embedding(hq)
        return fused.transpose(1, 2).reshape(len(common), -1, side, side)
