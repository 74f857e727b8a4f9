"""A step of stage 1 as it is published (VQGAN, CodeFormer, IQPIR): plain float32, a loop over parameters.

The adaptive weight takes the gradient of both losses at the last layer, each through its whole graph, and the
backward pass then goes through all of it again. Then the discriminator: two forwards, two backwards.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from iqpir.networks.restoration_network import AUTOENCODER_PARTS, RestorationNetwork
from iqpir.stages.batch import Batch
from iqpir.stages.stage1 import Stage1Config


class Loop:
    """Network, discriminator, their optimisers and the averaged copy."""

    def __init__(
        self,
        network: RestorationNetwork,
        discriminator: nn.Module,
        perceptual: Callable[[Tensor, Tensor], Tensor],
        config: Stage1Config,
    ) -> None:
        self.network, self.perceptual, self.config = network, perceptual, config
        self.discriminator = discriminator.train()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in AUTOENCODER_PARTS)
        self.average = copy.deepcopy(network).requires_grad_(False)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.Adam(trained, lr=7e-5, betas=(0.9, 0.99), foreach=False)
        self.critic_optimiser = torch.optim.Adam(discriminator.parameters(), lr=7e-5, betas=(0.9, 0.99), foreach=False)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Both optimisers once; the values of the losses."""
        config, last = self.config, self.network.generator.last_weight
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(False)
        self.optimiser.zero_grad()
        latent = self.network.encode(batch.hq)
        found = self.network.quantise(latent, batch.quality, config.quantiser)
        restored = self.network.generator(found.latent)
        pixel = (restored - batch.hq).abs().mean()
        perceptual = self.perceptual(restored, batch.hq)
        adversarial = -self.discriminator(restored).mean()
        reconstruction_norm = torch.autograd.grad(pixel + perceptual, last, retain_graph=True)[0].norm()
        adversarial_norm = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
        weight = (reconstruction_norm / (adversarial_norm + 1e-4)).clamp(0, 1).detach() * config.adversary.weight
        loss = pixel + perceptual + weight * adversarial + found.loss
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.mul_(config.ema_decay).add_(parameter, alpha=1 - config.ema_decay)
        return {
            "pixel_loss": pixel.detach(),
            "perceptual_loss": perceptual.detach(),
            "adversarial_weight": weight,
            "loss": loss.detach(),
            "discriminator_loss": self._train_discriminator(batch.hq, restored.detach()),
        }

    def _train_discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(True)
        self.critic_optimiser.zero_grad()
        on_real = torch.relu(1 - self.discriminator(real)).mean()
        on_real.backward()
        on_fake = torch.relu(1 + self.discriminator(fake)).mean()
        on_fake.backward()
        self.critic_optimiser.step()
        return (on_real + on_fake).detach()
