"""Restoration without codebooks: the conditioned latent itself is decoded. Only for comparing with codes."""

from torch import Tensor, nn

from iqpir.networks.fidelity import keep_tones
from iqpir.networks.restoration_network import RestorationNetwork
from iqpir.restorer import Restorer


class WithoutCodes(RestorationNetwork):
    """A restoration network whose answer is decoded from the latent before any code is chosen."""

    def forward(self, pictures: Tensor, quality: Tensor | None, fidelity: float = 0.0, adain: bool = True) -> Tensor:
        """As ``RestorationNetwork``; ``adain`` changes nothing, for the latent has its own statistics."""
        predicted = self.predict(pictures, quality, taps=fidelity > 0)
        return keep_tones(self.decode(predicted.latent, predicted.taps, fidelity), pictures, self.config.tones)


def restored_without_codes(restorer: Restorer) -> Restorer:
    """A restorer with the same weights that skips the codebooks."""
    network: nn.Module = restorer.network
    assert isinstance(network, RestorationNetwork)
    twin = WithoutCodes(network.config)
    twin.load_state_dict(network.state_dict())
    return Restorer(twin, restorer.device, metadata=restorer.metadata, policy=restorer.policy)
