"""Rows ``stage1-step`` and ``stage2-step``: whole optimisation steps, of one seed and the same batches."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.networks.discriminator import Discriminator, DiscriminatorConfig
from iqpir.networks.restoration_network import RestorationNetwork, build
from iqpir.stages.adversary import AdversaryConfig
from iqpir.stages.batch import Batch
from iqpir.stages.stage1 import Stage1, Stage1Config
from iqpir.stages.stage2 import Stage2, Stage2Config
from pipeline.bench.measure import Measured, Options, alternate, require_equal
from pipeline.bench.peers import peer
from pipeline.bench.pictures import picture
from pipeline.torchvision_ops import ensure_torchvision_operators

TOLERANCE = 2e-3
"""Of the largest difference of a loss over the compared steps, relative to the loss."""
COMPARED_STEPS = 2
SEED = 2603


def stage1(options: Options) -> Measured:
    """Autoencoder, LPIPS on VGG16 (random weights: none are fetched), active discriminator, moving average."""
    network, batch = _prepared(options)
    perceptual = _lpips(batch.hq.device)
    critic = Discriminator(DiscriminatorConfig.for_picture(network.config.image_size, "batch"))
    stage = Stage1(Stage1Config(adversary=AdversaryConfig(start_step=0)), perceptual=perceptual)
    state = stage.initial_state(copy.deepcopy(network), seed=SEED, discriminator=copy.deepcopy(critic))
    theirs = peer("stage1").Loop(network, critic.to(batch.hq.device), perceptual, stage.config)

    def ours() -> dict[str, Tensor]:
        values = stage.step(state, batch)
        state.step += 1
        return values

    names = ("pixel_loss", "perceptual_loss", "adversarial_weight", "loss", "discriminator_loss")
    return _measured(options, ours, lambda: theirs.step(batch), names)


def stage2(options: Options) -> Measured:
    """Losses against the codes, which ours has stored and the peer computes; no quality loss on either side."""
    network, batch = _prepared(options)
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    stored = Batch(
        hq=batch.hq, lq=batch.lq, quality=batch.quality, index=batch.index, flipped=batch.flipped,
        codes=teacher.encode_codes(batch.hq),
    )  # fmt: skip
    stage = Stage2(Stage2Config(quality_weight=0.0))
    state = stage.initial_state(copy.deepcopy(network), seed=SEED)
    theirs = peer("stage2").Loop(network, teacher, stage.config)

    def ours() -> dict[str, Tensor]:
        values = stage.step(state, stored)
        state.step += 1
        return values

    names = ("feature_loss", "common_code_loss", "hq_code_loss", "loss")
    return _measured(options, ours, lambda: theirs.step(batch), names)


def _measured(
    options: Options,
    ours: Callable[[], Mapping[str, Tensor]],
    theirs: Callable[[], Mapping[str, Tensor]],
    names: tuple[str, ...],
) -> Measured:
    """Compare the losses of the first steps, then time further ones."""
    checked: dict[str, float] = {}
    for _ in range(COMPARED_STEPS):
        mine, other = ours(), theirs()
        for name in names:
            difference = abs(float(mine[name]) - float(other[name])) / max(1e-6, abs(float(other[name])))
            require_equal(checked, f"relative difference of {name}", difference, TOLERANCE)

    def finished(step: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            step()
            if options.device == "cuda":
                torch.cuda.synchronize()

        return run

    rates = alternate(finished(ours), finished(theirs), 1, options.runs)
    facts = {"compared_steps": COMPARED_STEPS}
    return Measured(ours=rates[0], peer=rates[1], unit="steps/s", checked=checked, facts=facts)


def _prepared(options: Options) -> tuple[RestorationNetwork, Batch]:
    """A network of random weights and a batch of real pictures, degraded by blurring alone."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.manual_seed(SEED)
    network = build(options.preset).to(device)
    side = network.config.image_size
    stacked = np.stack([picture(number, side) for number in range(options.batch)])
    hq = torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    small = torch.nn.functional.avg_pool2d(hq, 4)
    lq = torch.nn.functional.interpolate(small, scale_factor=4.0, mode="bilinear")
    batch = Batch(
        hq=hq,
        lq=lq,
        quality=torch.linspace(0.6, 0.95, options.batch),
        index=torch.arange(options.batch),
        flipped=torch.zeros(options.batch, dtype=torch.bool),
    )
    return network, batch.to(device)


def _lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with random weights: the same work as with trained ones.

    Raises:
        UsageError: the package is not installed.
    """
    ensure_torchvision_operators()
    try:
        import lpips
    except ImportError as error:
        raise UsageError(
            f"The perceptual loss cannot be imported ({error}).", "pip install 'iqpir[plugin]'."
        ) from error
    metric = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    metric = metric.to(device).eval().requires_grad_(False)

    def distance(restored: Tensor, wanted: Tensor) -> Tensor:
        value: Tensor = metric(restored, wanted).mean()
        return value

    return distance
