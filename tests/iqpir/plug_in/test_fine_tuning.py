"""An attached prior learns what its dial means, on four architectures that spandrel loads and on a plain host."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iqpir.degradation.batched import degrade_batch
from iqpir.degradation.parameters import PRESETS, sample_parameters
from iqpir.errors import PermanentError, UsageError
from iqpir.plug_in.attached_prior import AttachedPrior, attach_quality_prior, load_quality_prior
from iqpir.plug_in.fine_tuning import FineTuneConfig, Pairs, rank_quality
from iqpir.quality_prior import QualityPrior, load_rank_network
from pipeline.torchvision_ops import ensure_torchvision_operators
from tests.conftest import draw_picture

SIDE = 32


@pytest.fixture(scope="module")
def pairs() -> list[Pairs]:
    """Three batches of degraded and good pictures [4,3,32,32] in [0,1]."""
    batches: list[Pairs] = []
    for start in (0, 4, 8):
        drawn = [torch.from_numpy(draw_picture(seed, SIDE).copy()) for seed in range(start, start + 4)]
        good = torch.stack(drawn).permute(0, 3, 1, 2).float() / 255
        parameters = [sample_parameters(PRESETS["tiny32"], 1, 0, seed) for seed in range(start, start + 4)]
        batches.append((degrade_batch(good, parameters), good))
    return batches


@pytest.fixture(scope="module")
def quality() -> QualityPrior:
    return rank_quality()


def swinir() -> nn.Module:
    from spandrel.architectures.SwinIR import SwinIR

    small = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "mlp_ratio": 2.0}
    network: nn.Module = SwinIR(img_size=16, upscale=1, upsampler="", **small)
    return network


def nafnet() -> nn.Module:
    from spandrel.architectures.NAFNet import NAFNet

    network: nn.Module = NAFNet(width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    return network


def restoreformer() -> nn.Module:
    from spandrel.architectures.RestoreFormer import RestoreFormer

    small = {"n_embed": 16, "embed_dim": 32, "z_channels": 32, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1}
    network: nn.Module = RestoreFormer(**small)
    return network


def codeformer() -> nn.Module:
    from spandrel_extra_arches.architectures.CodeFormer import CodeFormer

    network: nn.Module = CodeFormer(dim_embd=32, n_layers=1, codebook_size=16, latent_size=4, connect_list=[])
    return network


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "SwinIR": (swinir, ["conv_first", "layers.0", "layers.1.residual_group.blocks.1.mlp"], SIDE),
    "NAFNet": (nafnet, ["intro", "decoders.1.0"], SIDE),
    "RestoreFormer": (restoreformer, ["quantize", "decoder.up.1.block.1", "decoder.conv_in"], SIDE),
    "CodeFormer": (codeformer, ["encoder.blocks.24", "generator.blocks.12"], 64),
}


@pytest.fixture
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """spandrel's descriptor of a small network of random weights."""
    ensure_torchvision_operators()
    spandrel = pytest.importorskip("spandrel")
    extra = pytest.importorskip("spandrel_extra_arches")
    extra.install(ignore_duplicates=True)
    torch.manual_seed(4)
    make = ARCHITECTURES[request.param][0]
    found = spandrel.ModelLoader().load_from_state_dict(make().state_dict())
    if request.param == "CodeFormer":
        # Its forward names the latent of 512 pixels, 16x16; smaller pictures have a smaller one.
        quantize = found.model.quantize
        monkeypatch.setattr(quantize, "get_codebook_feat", functools.partial(square_codes, quantize))
    return found


def square_codes(quantize: Any, indices: Tensor, shape: list[int]) -> Tensor:
    side = int((indices.numel() // shape[0]) ** 0.5)
    return type(quantize).get_codebook_feat(quantize, indices, [shape[0], side, side, shape[3]])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("loaded", "name"),
    [
        pytest.param(name, name, marks=[pytest.mark.slow] if name == "CodeFormer" else [], id=name)
        for name in ARCHITECTURES
    ],
    indirect=["loaded"],
)
def test_an_architecture_of_spandrel_learns_the_dial(
    loaded: Any, name: str, pairs: list[Pairs], quality: QualityPrior, tmp_path: Any
) -> None:
    make, paths, side = ARCHITECTURES[name]
    host, run = loaded.model.eval(), loaded._call_fn
    size = functools.partial(nn.functional.interpolate, size=(side, side), mode="bilinear")
    batches: list[Pairs] = [(size(batch[0])[:2], size(batch[1])[:2]) for batch in pairs]
    state = copy.deepcopy(host.state_dict())
    lq = batches[0][0]
    with torch.no_grad():
        expected = run(host, lq)
    prior = attach_quality_prior(host, paths, mode="modulate", run=run, example=lq)
    with torch.no_grad():
        assert torch.equal(prior(lq, 0.9).view(torch.int32), expected.view(torch.int32))
    reached(prior, lq)

    # One batch again and again, its pictures asked for two qualities that are given: the loss can only fall.
    given: list[Pairs] = [(batch[0], batch[1], torch.tensor([0.05, 0.95])) for batch in batches[:2]]
    settings = FineTuneConfig(steps=4, learning_rate=0.01, dial_fraction=0.0)
    report = prior.fine_tune(given, settings, quality=quality)
    assert len(report.losses) == 4 and report.losses[-1] < report.losses[0]
    with torch.no_grad():
        assert (prior(lq, 0.05) - prior(lq, 0.95)).abs().mean() > 1e-4
        torch.testing.assert_close(run(host, lq), expected, atol=0, rtol=0)
    assert all(torch.equal(value, state[key]) for key, value in host.state_dict().items())
    make().load_state_dict(host.state_dict())

    asked = prior(lq, 0.7)
    prior.save(tmp_path / "prior.safetensors")
    prior.detach()
    assert torch.equal(load_quality_prior(host, tmp_path / "prior.safetensors", run=run)(lq, 0.7), asked)


def reached(prior: AttachedPrior, lq: Tensor) -> None:
    """A gradient arrives at every table; for 11 qualities at once, at every row of it."""
    pictures = lq[:1].expand(11, -1, -1, -1) if lq.shape[-1] <= SIDE else lq
    qualities = torch.linspace(0, 1, 11) if len(pictures) == 11 else torch.tensor([0.03, 0.97])
    prior(pictures, qualities).square().sum().backward()
    for path, table in zip(prior.paths, prior.tables, strict=True):
        assert table.grad is not None
        rows = table.grad.abs().sum(1) > 0
        assert int(rows.sum()) == (11 if len(pictures) == 11 else 4), path
        table.grad = None


def test_the_prior_without_a_corpus_leads_back_what_scores_outside_0_to_1(quality: QualityPrior) -> None:
    """Noise scores below 0, and a flat map would leave it there."""
    noise = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    assert bool((load_rank_network("rank")(noise) < 0).all())
    (gradient,) = torch.autograd.grad(quality(noise).sum(), noise)
    assert bool(gradient.flatten(1).any(dim=1).all())


def small_host() -> nn.Module:
    torch.manual_seed(7)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    with torch.no_grad():
        layers[3].weight.mul_(0.1)
    return Residual(layers)


class Residual(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures + self.layers(pictures)  # type: ignore[no-any-return]


def test_the_dial_is_learnt_and_reported_on_pictures_held_back(pairs: list[Pairs], quality: QualityPrior) -> None:
    host = small_host()
    prior = attach_quality_prior(host, ["layers.0", "layers.2"], mode="modulate")
    settings = FineTuneConfig(
        steps=60, learning_rate=0.005, quality_weight=2.0, dial_fraction=1.0, wish_weight=0.1, train="all"
    )
    report = prior.fine_tune(pairs, settings, quality=quality)
    low, middle, high = report.dial
    assert [point.asked for point in report.dial] == [0.05, 0.5, 0.95]
    assert low.quality < middle.quality < high.quality and high.quality - low.quality > 0.3
    assert report.before.asked is None
    # The report judges by a metric that was not in the loss, and by the distance to the good picture.
    judge = {point.judged for point in (report.before, *report.dial)}
    assert len(judge) == 4
    assert report.before.psnr == max(point.psnr for point in (report.before, *report.dial))


def test_alone_it_leaves_the_host_as_it_is_and_with_all_it_trains_it(pairs: list[Pairs], quality: QualityPrior) -> None:
    host = small_host().train()
    host.get_parameter("layers.0.bias").requires_grad_(False)
    before = copy.deepcopy(host.state_dict())
    prior = attach_quality_prior(host, "layers.0")
    prior.fine_tune(pairs, FineTuneConfig(steps=2), quality=quality)
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    assert host.training and host.get_parameter("layers.0.weight").requires_grad
    assert not host.get_parameter("layers.0.bias").requires_grad
    prior.fine_tune(pairs, FineTuneConfig(steps=2, train="all"), quality=quality)
    changed = {key for key, value in host.state_dict().items() if not torch.equal(value, before[key])}
    assert {"layers.0.weight", "layers.1.running_mean", "layers.3.weight"} <= changed
    assert "layers.0.bias" not in changed


def test_the_same_seed_teaches_the_same_tables(pairs: list[Pairs], quality: QualityPrior) -> None:
    def tables(seed: int) -> Tensor:
        prior = attach_quality_prior(small_host(), "layers.0")
        prior.fine_tune(pairs, FineTuneConfig(steps=3, seed=seed), quality=quality)
        return prior.tables[0].detach()

    assert torch.equal(tables(1), tables(1))
    assert not torch.equal(tables(1), tables(2))


def test_a_quality_that_is_given_is_not_measured(pairs: list[Pairs]) -> None:
    prior = attach_quality_prior(small_host(), "layers.0")
    own = torch.tensor([0.0, 0.1, 0.1, 0.0])
    given: list[Pairs] = [(lq, hq, own) for lq, hq, *_ in pairs]
    prior.fine_tune(given, FineTuneConfig(steps=1, dial_fraction=0.0), quality=rank_quality())
    moved = (prior.tables[0].detach().abs().sum(1) > 0).nonzero().flatten().tolist()
    assert moved == [0, 1]


def test_what_cannot_be_taught_from_is_refused(pairs: list[Pairs], quality: QualityPrior) -> None:
    prior = attach_quality_prior(small_host(), "layers.0")
    with pytest.raises(UsageError, match="fewer than two batches"):
        prior.fine_tune(pairs[:1], quality=quality)
    with pytest.raises(UsageError, match=r"Give \[B,3,H,W\] in \[0, 1\]"):
        prior.fine_tune([(lq, hq * 2 - 1) for lq, hq, *_ in pairs], quality=quality)
    with pytest.raises(PermanentError, match="not finite"):
        prior.fine_tune([(lq / 0 if number else lq, hq) for number, (lq, hq, *_) in enumerate(pairs)], quality=quality)


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"learning_rate": 0.0}, {"dial_fraction": 1.5}, {"quality_weight": -1.0}, {"dial": (2.0,)}]
)
def test_settings_that_make_no_sense_are_usage_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        FineTuneConfig(**fields)
