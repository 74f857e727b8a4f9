"""The rank network orders distortions, its gradient repairs pictures, and calibration maps stay monotone."""

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.quality_prior import (
    RANK_NETWORKS,
    PiecewiseLinear,
    QualityPrior,
    RankNetwork,
    load_rank_network,
)


def _picture(side: int, corner: int = 0) -> Tensor:
    """A piece of a photograph that no training saw: [1,3,side,side] in [0,1]."""
    top, left = 60 + 20 * corner, 190 + 10 * corner
    piece = skimage.data.astronaut()[top : top + side, left : left + side]
    return torch.from_numpy(piece.copy()).permute(2, 0, 1)[None].float() / 255.0


def _blurred(picture: Tensor, width: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(picture, width, 1, width // 2, count_include_pad=False)


def _identity(low: float = 0.0, high: float = 1.0) -> PiecewiseLinear:
    return PiecewiseLinear([low, high], [0.1, 0.9])


@pytest.mark.parametrize("name", RANK_NETWORKS)
def test_trained_networks_are_small_and_frozen(name: str) -> None:
    network = load_rank_network(name)
    assert sum(parameter.numel() for parameter in network.parameters()) <= 1_000_000
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


@pytest.mark.parametrize("name", RANK_NETWORKS)
@pytest.mark.parametrize("side", [32, 64, 160])
def test_blur_and_noise_cost_score_at_every_size(name: str, side: int) -> None:
    network, picture = load_rank_network(name), _picture(side)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    noisy = (picture + 0.15 * noise).clamp(0, 1)
    clean, blurred, bad = (float(network(version)) for version in (picture, _blurred(picture, 5), noisy))
    assert clean > blurred
    assert clean > bad


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 200)])
def test_any_size_from_32_gives_one_score_a_picture(size: tuple[int, int]) -> None:
    assert RankNetwork()(torch.rand(2, 3, *size)).shape == (2,)


def test_a_score_does_not_depend_on_the_batch() -> None:
    network = load_rank_network()
    pictures = torch.cat([_picture(48, seed) for seed in range(5)])
    alone = torch.cat([network(picture[None]) for picture in pictures])
    torch.testing.assert_close(network(pictures), alone, atol=1e-5, rtol=0)


def test_an_unknown_network_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match="rank_judge"):
        load_rank_network("rnak")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=12, unique=True),
    st.lists(st.floats(0.001, 0.999), min_size=12, max_size=12),
    st.lists(st.floats(-1000, 1000), min_size=2, max_size=30),
    st.booleans(),
)
def test_maps_are_monotone_and_strictly_inside_everywhere(
    knots: list[float], values: list[float], scores: list[float], falling: bool
) -> None:
    x = sorted(round(knot, 3) for knot in knots)
    if min(np.diff(x)) <= 0:
        return
    y = sorted(values[: len(x)], reverse=falling)
    mapped = PiecewiseLinear(x, y)(torch.tensor(sorted(scores), dtype=torch.float64))
    steps = mapped.diff() * (-1 if falling else 1)
    assert bool((steps >= -1e-12).all())
    assert bool(((mapped > 0) & (mapped < 1)).all())


def test_a_map_goes_through_its_knots_and_its_gradient_reaches_beyond_them() -> None:
    mapping = PiecewiseLinear([0.0, 1.0, 3.0], [0.2, 0.5, 0.9])
    scores = torch.tensor([-5.0, 0.0, 1.0, 2.0, 3.0, 8.0], requires_grad=True)
    values = mapping(scores)
    torch.testing.assert_close(values[1:5], torch.tensor([0.2, 0.5, 0.7, 0.9]))
    (gradient,) = torch.autograd.grad(values.sum(), scores)
    assert bool((gradient > 0).all())
    torch.testing.assert_close(gradient[3], torch.tensor(0.2))


def test_a_map_that_reaches_0_and_1_is_constant_beyond() -> None:
    mapping = PiecewiseLinear([0.0, 1.0], [0.0, 1.0])
    scores = torch.tensor([-2.0, 0.5, 7.0], requires_grad=True)
    values = mapping(scores)
    assert values.tolist() == [0.0, 0.5, 1.0]
    (gradient,) = torch.autograd.grad(values.sum(), scores)
    assert gradient.tolist() == [0.0, 1.0, 0.0]


def test_open_ends_go_straight_on_where_the_map_reaches_0_or_1_and_bend_elsewhere() -> None:
    scores = torch.tensor([-2.0, 0.5, 7.0], requires_grad=True)
    assert PiecewiseLinear([0.0, 1.0], [0.0, 1.0], open_ends=True)(scores).tolist() == [-2.0, 0.5, 7.0]
    assert PiecewiseLinear([0.0, 2.0], [1.0, 0.0], open_ends=True)(scores).tolist() == [2.0, 0.75, -2.5]
    inside = [PiecewiseLinear([0.0, 1.0], [0.1, 0.9], open_ends=ends)(scores) for ends in (False, True)]
    assert torch.equal(*inside)


def test_a_prior_refuses_a_map_that_is_constant_beyond_an_end() -> None:
    rank = {"rank": load_rank_network()}
    for values in ([0.0, 0.9], [0.1, 1.0], [1.0, 0.1]):
        with pytest.raises(UsageError, match=r"calibration of 'rank' is constant beyond its ends \[-1.0, 2.0\]"):
            QualityPrior(rank, {"rank": PiecewiseLinear([-1.0, 2.0], values)})
    QualityPrior(rank, {"rank": PiecewiseLinear([-1.0, 2.0], [0.0, 1.0], open_ends=True)})


def test_a_metric_is_probed_through_its_map() -> None:
    """Noise scores 0.5 or so, where this map is flat."""

    def mean(pictures: Tensor) -> Tensor:
        return pictures.mean((1, 2, 3))

    with pytest.raises(UsageError, match="'mean' gives no gradient"):
        QualityPrior({"mean": mean}, {"mean": PiecewiseLinear([0.0, 0.1, 0.9, 1.0], [0.1, 0.5, 0.5, 0.9])})


@pytest.mark.parametrize(
    ("knots", "values"),
    [([0.0], [0.5]), ([0.0, 0.0], [0.1, 0.2]), ([0.0, 1.0, 2.0], [0.1, 0.5, 0.3]), ([0.0, 1.0], [0.0, 1.2])],
)
def test_what_is_no_monotone_map_is_refused(knots: list[float], values: list[float]) -> None:
    with pytest.raises(UsageError):
        PiecewiseLinear(knots, values)


def test_quality_is_the_mean_of_calibrated_metrics_and_stays_in_evaluation_mode() -> None:
    first, second = load_rank_network(), load_rank_network("rank_judge")
    maps = {"rank": _identity(), "rank_judge": _identity(-1, 2)}
    prior = QualityPrior({"rank": first, "rank_judge": second}, maps)
    prior.train()
    pictures = torch.cat([_picture(40), _blurred(_picture(40), 3)])
    wanted = (maps["rank"](first(pictures)) + maps["rank_judge"](second(pictures))) / 2
    torch.testing.assert_close(prior(pictures), wanted)
    assert prior.scores(pictures).shape == (2, 2)
    assert not any(module.training for module in prior.modules())


def test_following_the_gradient_raises_quality_and_sharpens() -> None:
    prior = QualityPrior({"rank": load_rank_network()}, {"rank": _identity()})
    sharp = _picture(48)
    picture = _blurred(sharp, 3).clone().requires_grad_(True)
    before = float(prior(picture).detach())
    for _ in range(5):
        (gradient,) = torch.autograd.grad(prior(picture).sum(), picture)
        with torch.no_grad():
            picture = (picture + 0.02 * gradient / gradient.abs().amax()).clamp(0, 1)
        picture.requires_grad_(True)
    assert float(prior(picture).detach()) > before


def test_a_metric_without_gradient_is_refused_by_name() -> None:
    def counting(pictures: Tensor) -> Tensor:
        return (pictures > 0.5).float().mean((1, 2, 3))

    with pytest.raises(UsageError, match="'counting'"):
        QualityPrior({"counting": counting}, {"counting": _identity()})


def test_a_metric_without_calibration_and_an_empty_prior_are_refused() -> None:
    with pytest.raises(UsageError, match="rank"):
        QualityPrior({"rank": load_rank_network()}, {})
    with pytest.raises(UsageError, match="at least one"):
        QualityPrior({}, {})


def test_cost_bound_crops_at_random_only_when_asked() -> None:
    seen: list[Tensor] = []

    def mean(pictures: Tensor) -> Tensor:
        seen.append(pictures.detach())
        return pictures.mean((1, 2, 3))

    prior = QualityPrior({"mean": mean}, {"mean": _identity()}, max_side=32)
    pictures = _picture(80)
    prior(pictures)
    torch.testing.assert_close(seen[-1], pictures[..., 24:56, 24:56])
    prior(pictures, generator=torch.Generator().manual_seed(1))
    assert seen[-1].shape[-2:] == (32, 32)
    assert not torch.equal(seen[-1], seen[-2])
    resized = QualityPrior({"mean": mean}, {"mean": _identity()}, max_side=32, bound="resize")
    resized(torch.cat([pictures, pictures], dim=3))
    assert seen[-1].shape[-2:] == (16, 32)
