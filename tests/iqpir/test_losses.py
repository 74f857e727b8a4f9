"""Each loss has the value that its formula gives by hand."""

import math

import pytest
import torch

from iqpir.losses import (
    adversarial_weight,
    anchor_loss,
    code_loss,
    discriminator_loss,
    feature_loss,
    generator_loss,
    ms_ssim_loss,
    pixel_loss,
    quality_loss,
    to_unit_range,
)


def test_unit_range_maps_and_clamps() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.bfloat16)
    assert to_unit_range(values).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert to_unit_range(values).dtype == torch.float32


def test_pixel_loss_is_the_mean_absolute_difference() -> None:
    assert pixel_loss(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.0])).item() == 1.25


def test_adversarial_losses_are_the_hinge_game() -> None:
    fake = torch.tensor([-2.0, 0.0, 4.0])
    real = torch.tensor([2.0, 0.5, -1.0])
    assert generator_loss(fake).item() == pytest.approx(-2 / 3)
    assert discriminator_loss(real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 5) / 3)
    assert discriminator_loss(torch.full((2,), 1.0), torch.full((2,), -1.0)).item() == 0


def test_adversarial_weight_is_a_clamped_ratio_of_norms() -> None:
    three, four = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert adversarial_weight(three, four, largest=1.0, scale=0.8).item() == pytest.approx(0.8 * 3 / 4.0001)
    assert adversarial_weight(four, three, largest=1.0, scale=0.8).item() == pytest.approx(0.8)
    assert adversarial_weight(four, 0 * three, largest=1e9, scale=1.0).item() == pytest.approx(4e4)


def test_feature_loss_pulls_the_latent_only_and_divides_by_the_batch() -> None:
    latent = torch.zeros(2, 3, 2, 2, requires_grad=True)
    target = torch.full((2, 3, 2, 2), 2.0, requires_grad=True)
    loss = feature_loss(latent, target, torch.tensor([1.0, 0.0]))
    assert loss.item() == 4.0 / 2
    loss.backward()
    assert target.grad is None
    assert latent.grad is not None
    assert latent.grad[0].unique().item() == pytest.approx(-2 * 2.0 / 12 / 2)
    assert latent.grad[1].abs().max() == 0


def test_code_loss_is_the_cross_entropy_per_token_over_the_batch() -> None:
    logits = torch.zeros(2, 4, 8)
    codes = torch.arange(8).view(2, 2, 2)
    assert code_loss(logits, codes, torch.ones(2)).item() == pytest.approx(math.log(8))
    assert code_loss(logits, codes, torch.tensor([1.0, 0.0])).item() == pytest.approx(math.log(8) / 2)
    sure = 50 * torch.nn.functional.one_hot(codes.flatten(1), 8).float()
    assert code_loss(sure, codes, torch.ones(2)).item() == pytest.approx(0, abs=1e-6)


def test_quality_loss_maximises_or_matches() -> None:
    quality = torch.tensor([0.2, 0.6])
    assert quality_loss(quality).item() == pytest.approx(-0.4)
    assert quality_loss(quality, torch.tensor([0.5, 0.5])).item() == pytest.approx(0.2)
    assert quality_loss(quality, quality).item() == 0


@pytest.mark.parametrize("side", [16, 32, 192])
def test_ms_ssim_is_zero_for_equal_pictures_and_grows_with_blur(side: int) -> None:
    picture = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weak = torch.nn.functional.avg_pool2d(picture, 3, stride=1, padding=1)
    strong = torch.nn.functional.avg_pool2d(weak, 5, stride=1, padding=2)
    values = [ms_ssim_loss(other, picture).item() for other in (picture, weak, strong)]
    assert values[0] == pytest.approx(0, abs=1e-5)
    assert values[0] < values[1] < values[2] <= 1


def test_single_scale_ssim_of_two_constants_has_its_closed_form() -> None:
    first, second = torch.full((1, 3, 16, 16), -0.5), torch.full((1, 3, 16, 16), 0.5)
    luminance = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ms_ssim_loss(first, second, scales=1).item() == pytest.approx(1 - luminance, abs=1e-3)


def test_ms_ssim_has_a_gradient_everywhere() -> None:
    wanted = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    restored = (wanted * 0.3).requires_grad_()
    ms_ssim_loss(restored, wanted).backward()
    assert restored.grad is not None
    assert restored.grad.isfinite().all()
    assert (restored.grad.abs().amax(dim=1) > 0).float().mean() > 0.95


def test_the_anchor_is_pixel_distance_plus_lost_structure() -> None:
    wanted = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert anchor_loss(wanted, wanted).item() == pytest.approx(0.0, abs=1e-6)
    other = wanted.flip(-1)
    expected = pixel_loss(other, wanted) + ms_ssim_loss(other, wanted, scales=1)
    torch.testing.assert_close(anchor_loss(other, wanted), expected)
