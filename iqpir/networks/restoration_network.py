r"""The restoration network: dual-codebook autoencoder, quality-conditioned code prediction, fidelity.

    pictures -> encoder -> z (+ quality) -> Transformer -> codes -> codebooks -> generator -> pictures
                   \_________________ features, weighted by fidelity ____________/

State-dict keys and their order are those of the published CodeFormer and IQPIR checkpoints.
Sources: IQPIR (arXiv 2603.29773), CodeFormer (arXiv 2206.11253).
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from iqpir.config import NetworkConfig, preset
from iqpir.errors import UsageError
from iqpir.networks.autoencoder import Encoder, Generator
from iqpir.networks.blocks import FusionAttention
from iqpir.networks.code_transformer import CONDITION_CHANNELS, CodeTransformerLayer, code_head, deinterleave
from iqpir.networks.conditioning import QualityEmbedding, QualityEmbeddings, consensus, quality_embedding
from iqpir.networks.fidelity import FuseBlock, adaptive_instance_norm, keep_tones
from iqpir.networks.outcomes import Prediction, Quantised, Reconstruction
from iqpir.networks.vector_quantizer import PUBLISHED, QuantiserConfig, VectorQuantizer, straight_through

__all__ = ["AUTOENCODER_PARTS", "Prediction", "Quantised", "Reconstruction", "RestorationNetwork", "build"]

AUTOENCODER_PARTS = ("encoder", "quantize", "quantize_aesthetic", "attention", "generator")
"""Modules that stage 1 trains; their tensors are the autoencoder part of a state dict."""


class RestorationNetwork(nn.Module):
    """All networks of the method in one module; ``config`` decides which parts exist."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, side = config.transformer_width, config.latent_channels, config.latent_size
        modulated = config.conditioning == "adaln"
        self.position_emb = nn.Parameter(torch.zeros(side * side, width))
        self.encoder = Encoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, channels)
        self.quantize_aesthetic = (
            VectorQuantizer(config.codebook_size, channels) if config.codebooks == "dual" else None
        )
        fused_by_attention = config.codebooks == "dual" and config.fusion == "attention"
        self.attention = FusionAttention(channels) if fused_by_attention else None
        self.generator = Generator(config)
        self.feat_emb = nn.Linear(channels, width)
        self.score_embed = _score_embedding(config)
        self.ft_layers = nn.ModuleList(
            CodeTransformerLayer(width, config.transformer_heads, modulated) for _ in range(config.transformer_layers)
        )
        self.idx_pred_layer = code_head(width, config.codebook_size * self.books)
        self.fuse_convs_dict = nn.ModuleDict(
            {str(size): FuseBlock(self.encoder.widths[size]) for size in config.connect_sizes}
        )

    @property
    def books(self) -> int:
        """Number of codebooks, 1 or 2."""
        return 1 if self.quantize_aesthetic is None else 2

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B,3,R,R] in [-1,1] -> latent z [B,d,h,h].

        Raises:
            UsageError: pictures of another side than ``config.image_size``.
        """
        return self._encode(pictures, taps=False)[0]

    def encode_codes(self, pictures: Tensor) -> Tensor:
        """Nearest codes of both books, whatever the quality: [B,3,R,R] -> int64 [B,C,h,h]. No gradient."""
        with torch.no_grad():
            return self._codes(self.encode(pictures))

    def quantise(self, raw_latent: Tensor, quality: Tensor | None, config: QuantiserConfig = PUBLISHED) -> Quantised:
        """Stage 1: both codebooks, the HQ+ one only for samples with quality above the threshold.

        Args:
            raw_latent: encoder output z [B,d,h,h].
            quality: [B] or [B,n] in [0,1]; not needed without an HQ+ codebook.
            config: weights of the losses and the gradient estimator.
        """
        common = self.quantize(raw_latent, config)
        if self.quantize_aesthetic is None:
            gate = torch.zeros(len(raw_latent), dtype=torch.bool, device=raw_latent.device)
            return Quantised(common.latent, common.codes[:, None], common.loss, None, gate)
        gate = self._above_threshold(quality)
        hq = self.quantize_aesthetic(self._hq_input(raw_latent, common.codes), config)
        return Quantised(
            self._fuse_books(common.latent, hq.latent, gate),
            torch.stack([common.codes, hq.codes], dim=1),
            common.loss,
            hq.loss * gate,
            gate,
        )

    def decode(self, latent: Tensor, taps: Mapping[int, Tensor] | None = None, fidelity: float = 0.0) -> Tensor:
        """Latent [B,d,h,h] -> pictures [B,3,R,R], about [-1,1].

        With ``fidelity`` > 0 the encoder features ``taps`` (no gradient goes to them) correct the decoder's;
        with 0 the fidelity modules are not run at all.

        Raises:
            UsageError: ``fidelity`` is negative, or the network has no fidelity modules.
        """
        if fidelity < 0 or (fidelity > 0 and not self.fuse_convs_dict):
            raise UsageError(
                f"fidelity {fidelity} is not possible with connect_sizes {list(self.config.connect_sizes)}.",
                "Choose 0, or a positive number and a network with connect_sizes.",
            )
        pictures: Tensor = self.generator(latent, self._corrections(taps, fidelity) if fidelity > 0 else None)
        return pictures

    def reconstruct(
        self, pictures: Tensor, quality: Tensor | None, config: QuantiserConfig = PUBLISHED
    ) -> Reconstruction:
        """Stage 1 forward: encode, quantise, decode. Arguments as for ``encode`` and ``quantise``."""
        raw_latent = self.encode(pictures)
        quantised = self.quantise(raw_latent, quality, config)
        return Reconstruction(self.decode(quantised.latent), raw_latent, quantised)

    def predict(self, pictures: Tensor, quality: Tensor | None, *, taps: bool = False) -> Prediction:
        """Stage 2: logits of the codes that a picture of the wanted quality has.

        Args:
            pictures: [B,3,R,R] in [-1,1].
            quality: [B] or [B,n], clamped to [0,1]; not needed with ``conditioning="none"``.
            taps: keep encoder features for ``decode`` with fidelity > 0.

        Raises:
            UsageError: pictures of another side, or a missing or misshapen quality.
        """
        raw_latent, features = self._encode(pictures, taps)
        latent, condition = raw_latent, None
        if self.score_embed is not None:
            condition = self.score_embed(self._required(quality))
            if self.config.conditioning == "add":
                latent = raw_latent + condition
        tokens = self.feat_emb(latent.flatten(2).transpose(1, 2))
        for layer in self.ft_layers:
            tokens = layer(tokens, self.position_emb, condition)
        return Prediction(self.idx_pred_layer(tokens), latent, raw_latent, features, self.books)

    def lookup(self, codes: Tensor, quality: Tensor | None = None) -> Tensor:
        """Codes int64 [B,C,h,h] (common, HQ+) -> fused latent [B,d,h,h].

        With ``hq_gate="paper"`` the ``quality`` ([B] or [B,n]) decides on the HQ+ code; else it is always in.
        """
        common: Tensor = self.quantize.lookup(codes[:, 0])
        if self.quantize_aesthetic is None:
            return common
        hq = self.quantize_aesthetic.lookup(codes[:, 1])
        return self._fuse_books(common, hq, self._gate(quality, len(codes), codes.device))

    def soft_lookup(self, logits: Tensor, tau: float = 1.0, quality: Tensor | None = None) -> Tensor:
        """``lookup`` with expected code vectors under ``softmax(logits / tau)``: the logits get a gradient.

        Args:
            logits: [B,N,C*K], as in ``Prediction.logits``.
            tau: temperature > 0; towards 0 it becomes ``lookup`` of the most likely codes.
            quality: as for ``lookup``.
        """
        if self.quantize_aesthetic is None:
            return self.quantize.soft_lookup(logits, tau)
        common_logits, hq_logits = deinterleave(logits)
        common = self.quantize.soft_lookup(common_logits, tau)
        hq = self.quantize_aesthetic.soft_lookup(hq_logits, tau)
        return self._fuse_books(common, hq, self._gate(quality, len(logits), logits.device))

    def forward(self, pictures: Tensor, quality: Tensor | None, fidelity: float = 0.0, adain: bool = True) -> Tensor:
        """Restored pictures [B,3,R,R], about [-1,1], not clamped.

        Args:
            pictures: degraded pictures [B,3,R,R] in [-1,1].
            quality: wanted quality, [B] or [B,n] in [0,1].
            fidelity: 0 decodes the codes alone, 1 keeps most of the input (paper w).
            adain: give the decoded latent the channel statistics of the input's (off for inpainting).
        """
        prediction = self.predict(pictures, quality, taps=fidelity > 0)
        latent = straight_through(self.lookup(prediction.codes, quality), prediction.latent)
        if adain:
            latent = adaptive_instance_norm(latent, prediction.latent)
        return keep_tones(self.decode(latent, prediction.taps, fidelity), pictures, self.config.tones)

    def autoencoder_state(self) -> dict[str, Tensor]:
        """The part of the state dict that stage 1 trains, keys unchanged."""
        return _autoencoder_part(self.state_dict())

    def load_autoencoder(self, state: Mapping[str, Tensor]) -> None:
        """Load the autoencoder part of ``state``; every other part keeps its weights.

        Raises:
            UsageError: a tensor of the autoencoder is missing, unknown or of another shape.
        """
        part, own = _autoencoder_part(state), self.autoencoder_state()
        wrong = sorted(own.keys() ^ part.keys()) or [key for key in own if own[key].shape != part[key].shape]
        if wrong:
            raise UsageError(
                f"The weights are not of this autoencoder: {len(wrong)} tensors differ, such as {wrong[0]}.",
                "Use the network configuration that stage 1 was trained with.",
            )
        self.load_state_dict(part, strict=False)

    def _encode(self, pictures: Tensor, taps: bool) -> tuple[Tensor, dict[int, Tensor]]:
        side = self.config.image_size
        if pictures.shape[1:] != (3, side, side):
            raise UsageError(
                f"Pictures have shape {list(pictures.shape)}; this network takes [B, 3, {side}, {side}].",
                "Resize or tile them first.",
            )
        sizes = self.config.connect_sizes if taps else ()
        encoded: tuple[Tensor, dict[int, Tensor]] = self.encoder(pictures, sizes)
        return encoded

    def _codes(self, raw_latent: Tensor) -> Tensor:
        common = self.quantize.assign(raw_latent)
        if self.quantize_aesthetic is None:
            return common[:, None]
        hq = self.quantize_aesthetic.assign(self._hq_input(raw_latent, common))
        return torch.stack([common, hq], dim=1)

    def _hq_input(self, raw_latent: Tensor, common_codes: Tensor) -> Tensor:
        """What the HQ+ codebook quantises: z, or what the common code leaves of it (``residual_hq``)."""
        if not self.config.residual_hq:
            return raw_latent
        return raw_latent - self.quantize.lookup(common_codes).detach()

    def _fuse_books(self, common: Tensor, hq: Tensor, gate: Tensor) -> Tensor:
        """One latent of both vectors [B,d,h,h]; samples without ``gate`` (bool [B]) use the common one."""
        if self.attention is not None:
            fused: Tensor = self.attention(common, hq, gate)
            return fused
        return common + self.config.alpha * hq * gate[:, None, None, None]

    def _gate(self, quality: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Stage 2 and inference: which samples use their HQ+ code, bool [B]."""
        if self.config.hq_gate == "code":
            return torch.ones(batch, dtype=torch.bool, device=device)
        return self._above_threshold(quality)

    def _above_threshold(self, quality: Tensor | None) -> Tensor:
        return consensus(self._required(quality)) > self.config.hq_threshold

    def _required(self, quality: Tensor | None) -> Tensor:
        if quality is None:
            raise UsageError("This network needs a quality for every picture.", "Pass one, such as 0.95.")
        return quality

    def _corrections(self, taps: Mapping[int, Tensor] | None, fidelity: float) -> dict[int, "partial[Tensor]"]:
        if not taps:
            raise ValueError("fidelity > 0 needs the encoder features of predict(..., taps=True)")
        return {
            size: partial(self.fuse_convs_dict[str(size)], encoded=taps[size].detach(), fidelity=fidelity)
            for size in self.config.connect_sizes
        }


def _score_embedding(config: NetworkConfig) -> QualityEmbedding | QualityEmbeddings | None:
    if config.conditioning == "none":
        return None
    if config.conditioning == "add":
        return quality_embedding(config.quality_bins, config.latent_channels, config.latent_size)
    # Not zero here: the modulation that reads it starts at zero, and two zeros in a row would never learn.
    return quality_embedding(config.quality_bins, CONDITION_CHANNELS, config.latent_size, deviation=1.0)


def _autoencoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.split(".")[0] in AUTOENCODER_PARTS}


def build(name: str | NetworkConfig, device: str | torch.device = "cpu") -> RestorationNetwork:
    """A network with fresh weights, from a preset's name or a configuration.

    On ``device="meta"`` no weight is allocated: for shapes, keys and counting FLOPs.

    Raises:
        UsageError: no preset has that name.
    """
    with torch.device(device):
        return RestorationNetwork(preset(name) if isinstance(name, str) else name)
