"""Vector quantisation against closed forms."""

import pytest
import torch
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.networks.vector_quantizer import (
    PUBLISHED,
    QuantiserConfig,
    VectorQuantizer,
    nearest,
    rotate_through,
    rows_of,
    straight_through,
)


@pytest.fixture
def quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 8)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


@pytest.fixture
def latent() -> Tensor:
    return torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))


def test_codes_are_the_nearest_by_plain_distance(quantizer: VectorQuantizer, latent: Tensor) -> None:
    expected = torch.cdist(rows_of(latent).double(), quantizer.embedding.weight.double()).argmin(dim=1)
    assert torch.equal(quantizer.assign(latent).flatten(), expected)


def test_rows_come_by_sample_row_and_column(latent: Tensor) -> None:
    assert torch.equal(rows_of(latent)[1 * 16 + 2 * 4 + 3], latent[1, :, 2, 3])


def test_lookup_gives_each_position_its_vector(quantizer: VectorQuantizer, latent: Tensor) -> None:
    codes = quantizer.assign(latent)
    vectors = quantizer.lookup(codes)
    assert vectors.shape == latent.shape
    assert torch.equal(vectors[2, :, 1, 3], quantizer.embedding.weight[codes[2, 1, 3]])


def test_fresh_codes_are_uniform_in_one_over_k() -> None:
    weight = VectorQuantizer(64, 256).embedding.weight
    assert weight.abs().max() <= 1 / 64
    assert weight.std().item() == pytest.approx(1 / 64 / 3**0.5, rel=0.05)


def test_the_loss_is_per_sample_with_published_weights(quantizer: VectorQuantizer, latent: Tensor) -> None:
    assignment = quantizer(latent, PUBLISHED)
    distance = (quantizer.lookup(assignment.codes) - latent).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(assignment.loss, 1.25 * distance)


def test_each_weight_teaches_its_own_side(quantizer: VectorQuantizer, latent: Tensor) -> None:
    def gradients(commitment: float, codebook: float) -> tuple[float, float]:
        quantizer.zero_grad()
        source = latent.clone().requires_grad_()
        config = QuantiserConfig(commitment_weight=commitment, codebook_weight=codebook)
        quantizer(source, config).loss.sum().backward()
        weight = quantizer.embedding.weight.grad
        assert source.grad is not None
        return source.grad.norm().item(), 0.0 if weight is None else weight.norm().item()

    full_latent, quarter_codes = gradients(1.0, 0.25)
    quarter_latent, full_codes = gradients(0.25, 1.0)
    assert full_latent == pytest.approx(4 * quarter_latent, rel=1e-4)
    assert full_codes == pytest.approx(4 * quarter_codes, rel=1e-4)
    assert gradients(1.0, 0.0)[1] == 0.0
    with pytest.raises(UsageError, match="must not be negative"):
        QuantiserConfig(commitment_weight=-1.0)


def test_straight_through_is_exact_and_passes_the_gradient() -> None:
    value, path = torch.tensor([1e-3, 5.0]), torch.tensor([1e6, -3.0], requires_grad=True)
    result = straight_through(value, path)
    result.backward(torch.tensor([2.0, 7.0]))
    assert torch.equal(result, value)
    assert path.grad is not None
    assert path.grad.tolist() == [2.0, 7.0]


def test_the_rotation_reaches_the_code_and_keeps_angles_of_the_gradient(latent: Tensor) -> None:
    value = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    path = latent.clone().requires_grad_()
    result = rotate_through(value, path)
    torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-4)
    # A gradient along the code is turned along the latent, and scaled by the ratio of their lengths.
    result.backward(value)
    ratio = value.norm(dim=1, keepdim=True) / latent.norm(dim=1, keepdim=True)
    expected = latent / latent.norm(dim=1, keepdim=True) * value.norm(dim=1, keepdim=True) * ratio
    torch.testing.assert_close(path.grad, expected, atol=1e-4, rtol=1e-3)


def test_the_rotation_stands_opposite_and_zero_vectors() -> None:
    path = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).reshape(2, 2, 1, 1).requires_grad_()
    value = torch.tensor([[-2.0, 0.0], [0.0, 0.0]]).reshape(2, 2, 1, 1)
    result = rotate_through(value, path)
    torch.testing.assert_close(result, value)
    result.sum().backward()
    assert path.grad is not None
    assert path.grad.isfinite().all()


def test_the_rotation_is_chosen_by_the_configuration(quantizer: VectorQuantizer, latent: Tensor) -> None:
    def gradient(config: QuantiserConfig) -> Tensor:
        source = latent.clone().requires_grad_()
        quantizer(source, config).latent.sum().backward()
        assert source.grad is not None
        return source.grad

    assert torch.equal(gradient(PUBLISHED), torch.ones_like(latent))
    assert not torch.allclose(gradient(QuantiserConfig(estimator="rotation")), torch.ones_like(latent))


def test_soft_lookup_is_the_expected_vector(quantizer: VectorQuantizer) -> None:
    logits = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    soft = quantizer.soft_lookup(logits, tau=0.5)
    expected = torch.softmax(logits[1, 5] / 0.5, dim=-1) @ quantizer.embedding.weight
    torch.testing.assert_close(soft[1, :, 1, 2], expected)


def test_small_differences_of_large_vectors_are_told_apart() -> None:
    """Why the constant |row|^2 is left out of the distance: float32 would lose the difference in it."""
    codebook = torch.tensor([[1.0, 0.0], [1.001, 0.0]])
    rows = torch.tensor([[1.0, 900.0], [1.001, 900.0]])
    assert nearest(rows, codebook).tolist() == [0, 1]
