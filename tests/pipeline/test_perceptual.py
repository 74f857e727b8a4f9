"""The perceptual term: which pictures it compares, and in which direction it counts."""

import pytest
import torch

from iqpir.errors import UsageError
from pipeline.torchvision_ops import ensure_torchvision_operators
from pipeline.training.perceptual import perceptual_term, pyiqa_name


@pytest.mark.slow
def test_a_metric_gets_pictures_in_the_unit_range_and_scales_them_itself() -> None:
    """Nothing is normalised before the metric that it normalises again (the published LPIPS wrapper did)."""
    term = perceptual_term("gmsd", 1.0)
    import pyiqa

    metric = pyiqa.create_metric("gmsd", device=torch.device("cpu"))
    draws = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    restored, wanted = draws * 2.2 - 1.1
    assert term is not None
    expected = metric(((restored + 1) / 2).clamp(0, 1), ((wanted + 1) / 2).clamp(0, 1)).mean()
    torch.testing.assert_close(term(restored, wanted), expected)
    assert term(wanted, wanted) < 1e-6 < expected


def test_lpips_has_the_features_of_vgg_as_published() -> None:
    ensure_torchvision_operators()
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    assert DEFAULT_CONFIGS[pyiqa_name("lpips")]["metric_opts"]["net"] == "vgg"
    assert pyiqa_name("gmsd") == "gmsd"


@pytest.mark.parametrize(("name", "weight"), [("no-such-metric", 1.0), ("none", 1.0)])
def test_a_term_that_cannot_be_had_is_refused(name: str, weight: float) -> None:
    with pytest.raises(UsageError):
        perceptual_term(name, weight)
    assert perceptual_term(name, 0.0) is None
