"""How the input's identity is brought back: encoder features (stage 3), the latent's statistics, tones."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iqpir.networks.blocks import ResidualBlock, convolution


def _affine_head(channels: int) -> nn.Sequential:
    return nn.Sequential(convolution(channels, channels), nn.LeakyReLU(0.2), convolution(channels, channels))


class FuseBlock(nn.Module):
    """Controllable feature transformation: scale and shift of decoder features, predicted from both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encode_enc = ResidualBlock(2 * channels, channels)
        self.scale = _affine_head(channels)
        self.shift = _affine_head(channels)

    def forward(self, decoded: Tensor, encoded: Tensor, fidelity: float) -> Tensor:
        """``decoded``, ``encoded`` [B,c,H,W]; ``fidelity`` >= 0 weighs the correction -> [B,c,H,W]."""
        joint = self.encode_enc(torch.cat([encoded, decoded], dim=1))
        corrected: Tensor = decoded + fidelity * (decoded * self.scale(joint) + self.shift(joint))
        return corrected


def _mean_and_std(features: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(features, dim=(2, 3), correction=1, keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def adaptive_instance_norm(content: Tensor, style: Tensor) -> Tensor:
    """``content`` [B,c,H,W] with the mean and (unbiased) deviation of each channel of ``style``.

    Source: arXiv 1703.06868, equation 8.
    """
    content_mean, content_std = _mean_and_std(content.float())
    style_mean, style_std = _mean_and_std(style.float())
    return ((content - content_mean) / content_std * style_std + style_mean).to(content.dtype)


def keep_tones(restored: Tensor, pictures: Tensor, window: int) -> Tensor:
    """``restored`` [B,3,H,W] with the local means of ``pictures``, whose coarse tones degradation hardly changes.

    Colour correction by the low band, as diffusion restorers do (StableSR, arXiv 2305.07015), with a box filter.

    Args:
        restored: any range; H and W above ``window`` / 2.
        pictures: what it was restored from, same shape and range.
        window: side of the box in pixels, made odd; 0 returns ``restored``.
    """
    if window == 0:
        return restored
    reach = window // 2
    difference = functional.pad(pictures - restored, (reach, reach, reach, reach), mode="reflect")
    return restored + functional.avg_pool2d(difference, 2 * reach + 1, stride=1)
