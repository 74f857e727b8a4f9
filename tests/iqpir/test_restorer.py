"""What ``iqpir.restorer`` promises."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from iqpir.config import NetworkConfig, preset
from iqpir.errors import PermanentError, UsageError, VerificationError
from iqpir.networks.restoration_network import RestorationNetwork, build
from iqpir.pixels import PictureError, decode, encode_jpeg, encode_png
from iqpir.restorer import Restorer, save_model


class Passthrough(nn.Module):
    """A network that answers with its input: what is left is what the restorer does."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.config = preset("tiny32")
        self.generator = nn.Identity()
        self.gain = gain
        self.seen: list[tuple[tuple[int, ...], list[Any], float]] = []

    def forward(self, pictures: Tensor, quality: Tensor, fidelity: float = 0.0, adain: bool = True) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.seen.append((tuple(pictures.shape), quality.tolist(), fidelity))
        return pictures * self.gain


def scene(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def trained_looking(config: NetworkConfig | str = "tiny32") -> RestorationNetwork:
    """A network whose every part, the score embeddings too, has an effect on the output."""
    torch.manual_seed(3)
    network = build(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("score_embed", "quantize")):
                parameter.normal_(std=1.0)
    return network


@pytest.fixture(scope="module")
def network() -> RestorationNetwork:
    return trained_looking().eval()


def test_a_picture_of_the_network_size_is_one_plain_forward(network: RestorationNetwork) -> None:
    picture = scene(32, 32)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        direct = network(pixels, torch.tensor([0.95]), 0.0).clamp(-1, 1)
    expected = ((direct[0] + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8).numpy()
    restored = Restorer(network).restore(picture)
    assert np.array_equal(restored, expected)
    assert not np.array_equal(restored, picture)


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (32, 32), (33, 32), (31, 31), (64, 64), (77, 45)])
def test_any_size_comes_back_at_its_size_and_blending_changes_nothing(size: tuple[int, int]) -> None:
    picture = scene(*size)
    passthrough = Passthrough()
    assert np.array_equal(Restorer(passthrough).restore(picture), picture)  # type: ignore[arg-type]
    assert all(shape[1:] == (3, 32, 32) for shape, _, _ in passthrough.seen)


def test_tiles_of_several_pictures_share_batches() -> None:
    passthrough = Passthrough()
    restorer = Restorer(passthrough, batch_size=4)  # type: ignore[arg-type]
    pictures = [scene(32, 32, 1), scene(60, 32, 2), scene(10, 10, 3), scene(32, 60, 4)]
    restored = restorer.restore_batch(pictures, quality=0.5, fidelity=0.25)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, restored, strict=True))
    assert [shape[0] for shape, _, _ in passthrough.seen] == [4, 2]
    assert passthrough.seen[0][1:] == ([0.5] * 4, 0.25)


def test_every_kind_comes_back_as_its_kind() -> None:
    picture = scene(40, 50)
    restorer = Restorer(Passthrough())  # type: ignore[arg-type]
    from_bytes = restorer.restore(encode_png(picture))
    assert from_bytes.startswith(b"\x89PNG")
    assert np.array_equal(decode(from_bytes).array, picture)
    assert restorer.restore(encode_jpeg(picture)).startswith(b"\x89PNG")
    from_pil = restorer.restore(Image.fromarray(picture))
    assert isinstance(from_pil, Image.Image)
    assert np.array_equal(np.asarray(from_pil), picture)
    tensor = torch.from_numpy(picture).permute(2, 0, 1) / 255
    assert torch.allclose(restorer.restore(tensor), tensor, atol=1e-6)
    several = torch.stack([tensor, tensor.flip(-1)])
    assert torch.allclose(restorer.restore(several), several, atol=1e-6)
    assert restorer.restore(tensor.double()).dtype == torch.float64


def test_flipped_views_of_arrays_are_taken() -> None:
    picture = scene(32, 40)[:, ::-1]
    assert np.array_equal(Restorer(Passthrough()).restore(picture), picture)  # type: ignore[arg-type]


def test_a_pil_picture_with_transparency_follows_the_pixel_policy() -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    restored = Restorer(Passthrough()).restore(Image.fromarray(rgba))  # type: ignore[arg-type]
    assert np.asarray(restored).min() == 255


def test_the_answer_is_within_range_whatever_the_network_says() -> None:
    tensor = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    restored = Restorer(Passthrough(gain=9.0)).restore(tensor)  # type: ignore[arg-type]
    assert (float(restored.min()), float(restored.max())) == (0.0, 1.0)


@pytest.mark.parametrize("gain", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error_not_a_picture(gain: float) -> None:
    with pytest.raises(PermanentError, match="not finite"):
        Restorer(Passthrough(gain)).restore(scene(32, 32))  # type: ignore[arg-type]


def test_the_quality_dial_changes_the_output(network: RestorationNetwork) -> None:
    restorer, picture = Restorer(network), scene(32, 32)
    low, high = (restorer.restore(picture, quality=quality) for quality in (0.05, 0.95))
    assert not np.array_equal(low, high)
    # 0.95 and 1.0 are one bin of the ten.
    assert np.array_equal(high, restorer.restore(picture, quality=1.0))


def test_the_fidelity_dial_changes_the_output(network: RestorationNetwork) -> None:
    restorer, picture = Restorer(network), scene(32, 32)
    assert not np.array_equal(restorer.restore(picture), restorer.restore(picture, fidelity=1.0))


@pytest.mark.parametrize(
    ("metadata", "sizes", "taken"),
    [
        ({"stage": "stage1"}, (16,), False),
        ({"stage": "stage2"}, (16,), False),
        ({"stage": "stage3"}, (16,), True),
        ({}, (16,), True),
        ({}, (), False),
    ],
)
def test_fidelity_needs_modules_that_stage_3_trained(
    metadata: dict[str, Any], sizes: tuple[int, ...], taken: bool
) -> None:
    network = build(dataclasses.replace(preset("tiny32"), connect_sizes=sizes))
    restorer = Restorer(network, metadata=metadata)
    assert restorer.takes_fidelity is taken
    assert restorer.restore(scene(32, 32), fidelity=0.0).shape == (32, 32, 3)
    if taken:
        restorer.restore(scene(32, 32), fidelity=0.5)
    else:
        with pytest.raises(UsageError, match=r"fidelity 0\.5 needs what stage 3 trains"):
            restorer.restore(scene(32, 32), fidelity=0.5)


def test_several_conditioning_scores_take_one_quality_or_one_each() -> None:
    config = dataclasses.replace(preset("tiny32"), quality_bins=(10, 20))
    restorer, picture = Restorer(trained_looking(config)), scene(32, 32)
    repeated = restorer.restore(picture, quality=0.9)
    assert np.array_equal(repeated, restorer.restore(picture, quality=[0.9, 0.9]))
    assert not np.array_equal(repeated, restorer.restore(picture, quality=[0.9, 0.1]))
    with pytest.raises(UsageError, match="one or 2"):
        restorer.restore(picture, quality=[0.9, 0.9, 0.9])


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), "0.5"])
@pytest.mark.parametrize("dial", ["quality", "fidelity"])
def test_dials_out_of_range_are_usage_errors(dial: str, value: Any) -> None:
    with pytest.raises(UsageError, match=dial):
        Restorer(Passthrough()).restore(scene(32, 32), **{dial: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 3), np.float32),
        np.zeros((0, 32, 3), np.uint8),
        torch.zeros(1, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.full((3, 32, 32), -0.5),
        torch.full((3, 32, 32), float("nan")),
        "picture.png",
    ],
)
def test_what_is_no_picture_is_a_usage_error(picture: Any) -> None:
    with pytest.raises(UsageError):
        Restorer(Passthrough()).restore(picture)  # type: ignore[arg-type]


def test_bytes_that_do_not_decode_raise_a_picture_error() -> None:
    restorer = Restorer(Passthrough())  # type: ignore[arg-type]
    for data in (b"", b"not a picture", encode_png(scene(32, 32))[:-40]):
        with pytest.raises(PictureError):
            restorer.restore(data)


def test_a_saved_model_restores_the_same(network: RestorationNetwork, tmp_path: Path) -> None:
    save_model(network, tmp_path / "model", {"stage": 3, "alpha": 0.8})
    loaded = Restorer.load(tmp_path / "model")
    assert loaded.metadata == {"stage": 3, "alpha": 0.8}
    assert loaded.network.config == network.config
    picture = scene(45, 33)
    assert np.array_equal(loaded.restore(picture), Restorer(network).restore(picture))


def test_a_directory_without_a_model_is_a_usage_error(network: RestorationNetwork, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        Restorer.load(tmp_path / "nowhere")
    save_model(network, tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        Restorer.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_weights_are_a_verification_error(damage: str, network: RestorationNetwork, tmp_path: Path) -> None:
    save_model(network, tmp_path, {})
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes({"cut": data[: len(data) // 2], "text": b"version https://git-lfs", "empty": b""}[damage])
    with pytest.raises(VerificationError, match=r"model\.safetensors"):
        Restorer.load(tmp_path)


def test_a_damaged_or_foreign_configuration_is_a_verification_error(
    network: RestorationNetwork, tmp_path: Path
) -> None:
    save_model(network, tmp_path, {})
    config = tmp_path / "config.json"
    facts = json.loads(config.read_text())
    config.write_text("{")
    with pytest.raises(VerificationError, match="not JSON"):
        Restorer.load(tmp_path)
    config.write_text("{}")
    with pytest.raises(VerificationError, match="network"):
        Restorer.load(tmp_path)
    facts["network"]["codebook_size"] = 128
    config.write_text(json.dumps(facts))
    with pytest.raises(VerificationError, match="tensors differ"):
        Restorer.load(tmp_path)


def test_settings_that_cannot_work_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="overlap"):
        Restorer(Passthrough(), overlap=32)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_size"):
        Restorer(Passthrough(), batch_size=0)  # type: ignore[arg-type]


def test_a_cmyk_pil_picture_is_taken() -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene(32, 32)).convert("CMYK").save(buffer, format="JPEG")
    restored = Restorer(Passthrough()).restore(Image.open(buffer))  # type: ignore[arg-type]
    assert restored.mode == "RGB"
