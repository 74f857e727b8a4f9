"""Transformer that predicts the codes of the undegraded picture from the degraded picture's latent."""

from torch import Tensor, nn
from torch.nn import functional

CONDITION_CHANNELS = 32
"""Channels of the quality map that modulates the layers (``conditioning="adaln"``)."""


class CodeTransformerLayer(nn.Module):
    """Pre-norm layer: self-attention, then a two-layer perceptron of twice the width.

    The position is added to queries and keys, never to values. With ``modulated`` both branches are scaled,
    shifted and gated by the quality (adaptive layer norm, arXiv 2212.09748), starting from gates of zero.
    """

    def __init__(self, width: int, heads: int, modulated: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.adaLN_modulation = _modulation(width) if modulated else None

    def forward(self, tokens: Tensor, position: Tensor, condition: Tensor | None = None) -> Tensor:
        """``tokens`` [B,N,D], ``position`` [N,D], ``condition`` [B,32,h,h] with h*h = N -> [B,N,D]."""
        attended: Tensor
        if self.adaLN_modulation is None:
            attended = tokens + self._attend(self.norm1(tokens), position)
            return attended + self._perceptron(self.norm2(attended))
        if condition is None:
            raise ValueError("a modulated layer needs the quality map")
        modulation = self.adaLN_modulation(condition).flatten(2).transpose(1, 2)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        attended = tokens + gate1 * self._attend(self.norm1(tokens) * (1 + scale1) + shift1, position)
        refined: Tensor = gate2 * self._perceptron(self.norm2(attended) * (1 + scale2) + shift2)
        return attended + refined

    def _attend(self, normed: Tensor, position: Tensor) -> Tensor:
        placed = normed + position
        attended: Tensor = self.self_attn(placed, placed, normed, need_weights=False)[0]
        return attended

    def _perceptron(self, normed: Tensor) -> Tensor:
        output: Tensor = self.linear2(functional.gelu(self.linear1(normed)))
        return output


def _modulation(width: int) -> nn.Sequential:
    last = nn.Conv2d(CONDITION_CHANNELS, 6 * width, kernel_size=3, padding=1)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.SiLU(), last)


def code_head(width: int, units: int) -> nn.Sequential:
    """Layer norm and a linear map to ``units`` logits per token."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, units, bias=False))


def deinterleave(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [...,2K] in the published layout -> (common [...,K], HQ+ [...,K]).

    Unit 2k is HQ+ code k, unit 2k+1 is common code k.
    """
    pairs = logits.view(*logits.shape[:-1], -1, 2)
    return pairs[..., 1], pairs[..., 0]
