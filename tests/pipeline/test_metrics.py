"""The registry, weights without a network, and what each embedded metric can order."""

import contextlib
import hashlib
import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from safetensors import safe_open
from scipy.stats import spearmanr
from torch import Tensor

from iqpir.errors import UsageError
from iqpir.quality_prior import RANK_FACTS
from pipeline.fit_metric import FitMetricConfig, fit_metric
from pipeline.metrics import Scorer, find_metrics, scorer_digest, scorer_dtypes
from pipeline.metrics.distortions import BASIC, KINDS, Picture, distort
from pipeline.metrics.niqe_model import Niqe, fit_pristine_model, load_pristine_model
from pipeline.metrics.pyiqa_adapter import NIQE_MODEL, no_reference_metrics
from pipeline.metrics.small_pictures import Enlarged, enlarge
from pipeline.metrics.weights import Weights, without_network
from pipeline.storage import Storage
from pipeline.torchvision_ops import ensure_torchvision_operators
from tests.pipeline.corpus.conftest import s3 as s3
from tests.pipeline.corpus.conftest import s3_server as s3_server
from tests.pipeline.drawn_corpus import drawn_picture

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
SEVERITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.fixture(autouse=True)
def torchvision_operators() -> None:
    """pyiqa imports in any order of tests."""
    ensure_torchvision_operators()


def _tensor(pictures: list[Picture]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255.0


def _photographs() -> list[Picture]:
    folder = Path(skimage.__file__).parent / "data"
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]


def _order(scorer: Scorer, picture: Picture, kind: str) -> float:
    """Spearman correlation of score and (falling) severity, the undistorted picture included."""
    chain = [picture, *(distort(picture, kind, severity, 0) for severity in SEVERITIES)]
    with torch.inference_mode():
        scores = scorer(_tensor(chain)).numpy()
    return float(spearmanr(scores, -np.arange(len(chain))).statistic)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="rank_judge"):
        find_metrics(["rank_juge"])


@pytest.mark.slow
def test_names_of_pyiqa_are_known_with_direction_and_licence() -> None:
    musiq, brisque = find_metrics(["musiq", "brisque"])
    assert (musiq.direction, brisque.direction) == ("higher", "lower")
    assert musiq.score_range == (0.0, 100.0)
    assert (musiq.differentiable, brisque.differentiable) == (True, False)
    assert not musiq.batchable
    with pytest.raises(UsageError, match="musiq"):
        find_metrics(["musiqq"])


def test_commercial_safe_refuses_what_may_not_be_sold_and_says_what_may() -> None:
    assert [metric.name for metric in find_metrics(["rank", "rank_judge"], commercial_safe=True)] == [
        "rank",
        "rank_judge",
    ]
    with pytest.raises(UsageError, match=r"piqe: .*Noncommercial.*niqe: .*rank_judge"):
        find_metrics(["piqe", "niqe", "rank"], commercial_safe=True)


def test_a_package_adds_a_metric_through_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brightness_metric.py").write_text(
        "from pipeline.metrics import Metric\n"
        "METRIC = Metric(name='brightness', version='1', direction='higher', differentiable=True,\n"
        "                licence='CC0', commercial=True,\n"
        "                scorer=lambda device, weights_uri=None: lambda x: x.mean((1, 2, 3)))\n"
    )
    information = tmp_path / "brightness-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1\n")
    (information / "entry_points.txt").write_text(
        "[iqpir.metrics]\nbrightness = brightness_metric:METRIC\nliar = brightness_metric:METRIC\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    metric = find_metrics(["brightness"], commercial_safe=True)[0]
    assert metric.scorer("cpu")(torch.full((2, 3, 4, 4), 0.25)).tolist() == [0.25, 0.25]
    with pytest.raises(UsageError, match="'liar'"):
        find_metrics(["liar"])


def test_a_metric_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="twice"):
        find_metrics(["rank", "rank"])


@pytest.mark.slow
def test_missing_weights_are_an_error_that_names_file_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"brisque_svm_weights\.pth.*weights_uri"):
        find_metrics(["brisque"])[0].scorer("cpu")


@pytest.mark.slow
def test_each_metric_of_pyiqa_is_built_or_names_the_weights_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks are laid out without memory, but for those that refuse that."""
    real = ("compare2score", "entropy", "fgresq", "niqe", "piqe", "qalign", "topiq_iaa", "topiq_nr_swin")
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "pyiqa"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    names = no_reference_metrics()
    assert len(names) > 60
    found = {}
    for metric in find_metrics(sorted(names)):
        try:
            with contextlib.nullcontext() if metric.name.startswith(real) else torch.device("meta"):
                metric.scorer("cpu")
        except UsageError as error:
            found[metric.name] = str(error)
    assert {"entropy", "niqe", "piqe"} == names.keys() - found.keys()
    named = re.compile(
        r"needs (the weight file \S+|\S+ of the Hugging Face repository \S+); .*(Put it at|Fill the cache)"
    )
    assert [text for text in found.values() if not named.search(text)] == []


@pytest.fixture(params=["folder", "s3"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty place for weights."""
    if request.param == "folder":
        return Storage.open(str(tmp_path / "mirror"))
    request.getfixturevalue("s3")
    return Storage.open(f"s3://pictures/{tmp_path.name}/mirror")


@pytest.mark.slow
def test_a_mirror_gives_checked_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: Storage) -> None:
    cache, name = tmp_path / "cache", "niqe_matlab_params.mat"
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(cache))

    def build() -> Scorer:
        return find_metrics(["niqe_matlab"])[0].scorer("cpu", mirror.url)

    data = NIQE_MODEL.read_bytes()
    mirror.publish(name, data)
    with pytest.raises(UsageError, match="SHA256SUMS"):
        build()
    mirror.publish("SHA256SUMS", f"{'0' * 64}  {name}\n".encode())
    with pytest.raises(UsageError, match="is not what SHA256SUMS says"):
        build()
    assert not list(cache.glob("*.mat"))
    mirror.publish("SHA256SUMS", f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode())
    scorer = build()
    assert (cache / name).read_bytes() == data
    pictures = _tensor([drawn_picture(0, 224)])
    with torch.inference_mode():
        torch.testing.assert_close(scorer(pictures), find_metrics(["niqe"])[0].scorer("cpu")(pictures))

    build()
    (cache / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UsageError, match=rf"cached weight file .*{name} is not what SHA256SUMS"):
        build()
    (cache / name).write_bytes(data)
    mirror.remove("SHA256SUMS")
    with pytest.raises(UsageError, match=r"has no SHA256SUMS .*niqe_matlab"):
        build()


@pytest.mark.slow
def test_a_mirror_serves_hugging_face_and_clip_too_and_what_is_nowhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the functions that timm and CLIP call; a build names repository and file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    import timm.models._hub as hub
    from pyiqa.utils import download_util

    mirror = tmp_path / "mirror"
    files = {"timm/tiny.in1k/model.safetensors": b"weights", "RN50.pt": b"clip" * 5000}
    for name, data in files.items():
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror / name).write_bytes(data)
    lines = [f"{hashlib.sha256(data).hexdigest()}  ./{name}" for name, data in files.items()]
    (mirror / "SHA256SUMS").write_text("\n".join(lines))
    weights = Weights("topiq_nr", Storage.open(str(mirror)))
    with without_network(weights, download_util):
        found = Path(hub.hf_hub_download("timm/tiny.in1k", "model.safetensors"))
        with urllib.request.urlopen("https://example.org/x/RN50.pt") as answer:
            assert answer.info().get("Content-Length") == "20000" and answer.read(4) == b"clip"
        with pytest.raises(OSError, match="Hub"):
            hub.hf_hub_download("timm/tiny.in1k", "absent.bin")
    assert found.read_bytes() == b"weights" and tmp_path / "hub" in found.parents
    found.write_bytes(b"others!")
    with without_network(weights, download_util), pytest.raises(UsageError, match="cached weight file"):
        hub.hf_hub_download("timm/tiny.in1k", "model.safetensors")
    assert weights.missing == ["timm/tiny.in1k/absent.bin"]
    with pytest.raises(UsageError, match=r"model\.safetensors of the Hugging Face repository timm/resnet50"):
        find_metrics(["topiq_nr-face"])[0].scorer("cpu")
    with pytest.raises(UsageError, match=r"RN50\.pt.*hub/clip/RN50\.pt"):
        find_metrics(["clipiqa"])[0].scorer("cpu")


@pytest.mark.slow
def test_each_no_reference_metric_of_pyiqa_has_a_name_and_facts() -> None:
    names = sorted(no_reference_metrics())
    assert len(names) >= 65
    metrics = find_metrics(names)
    assert [metric.name for metric in metrics] == names
    assert all(metric.licence and metric.version.startswith("pyiqa") for metric in metrics)


@pytest.mark.slow
def test_niqe_is_pyiqas_where_that_is_finite_and_finite_everywhere() -> None:
    ours = find_metrics(["niqe"])[0].scorer("cpu")
    import pyiqa

    theirs = pyiqa.create_metric("niqe", device="cpu", pretrained_model_path=str(NIQE_MODEL))
    # The second has a flat region of 96 pixels: its statistics hang on the last bits of the window's weights.
    pictures = _tensor([drawn_picture(seed, 200) for seed in range(2)])
    pictures[1, :, 8:104, 8:104] = 0.5
    torch.testing.assert_close(ours(pictures), theirs(pictures).reshape(-1).float(), rtol=1e-5, atol=0)
    flat = torch.full((1, 3, 40, 200), 0.5)
    assert float(ours(flat)) > float(ours(pictures).max())
    assert bool(ours(pictures[..., :33, :35]).isfinite().all())


@pytest.mark.slow
def test_niqe_refuses_to_be_fitted_on_too_little() -> None:
    with pytest.raises(UsageError, match="sharp blocks"):
        fit_pristine_model([drawn_picture(0, 200)])


@pytest.mark.slow
def test_a_fitted_niqe_model_is_reproducible_and_loads(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for seed in range(14):
        Image.fromarray(drawn_picture(seed, 388)).save(source / f"{seed}.png")
    results = [
        fit_metric(
            FitMetricConfig(
                metric="niqe", input=str(source), output=str(tmp_path / name), dataset="drawn", licence="none"
            )
        )
        for name in ("a.mat", "b.mat")
    ]
    assert results[0].sha256 == results[1].sha256
    model = load_pristine_model(tmp_path / "a.mat")
    assert model.mean.shape == (36,)
    assert bool(Niqe(model)(_tensor([drawn_picture(3, 200)])).isfinite().all())


@pytest.mark.slow
def test_rank_training_is_reproducible_learns_and_records_its_data(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for seed in range(3):
        Image.fromarray(drawn_picture(seed, 200)).save(source / f"{seed}.png")

    def train(name: str, seed: int) -> str:
        return fit_metric(
            FitMetricConfig(
                metric="rank_judge",
                input=str(source),
                output=str(tmp_path / name),
                dataset="drawn",
                licence="none",
                steps=2,
                seed=seed,
            )
        ).sha256

    first = train("a.safetensors", 0)
    assert train("b.safetensors", 0) == first
    assert train("c.safetensors", 1) != first
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        facts = json.loads(file.metadata()[RANK_FACTS])
    assert (facts["dataset"], facts["pictures"], facts["steps"]) == ("drawn", "3", "2")


def test_the_weights_in_the_repository_name_their_data_and_licence() -> None:
    folder = Path(__file__).parents[2] / "iqpir" / "weights"
    for name in ("rank_quality", "rank_judge"):
        path = folder / f"{name}.safetensors"
        assert path.stat().st_size < 4 << 20
        with safe_open(str(path), "pt") as file:
            facts = json.loads(file.metadata()[RANK_FACTS])
        assert facts["licence"]
        assert "CID22" in facts["dataset"]


def test_digest_covers_every_tensor_of_a_scorer() -> None:
    rank, judge = (metric.scorer("cpu") for metric in find_metrics(["rank", "rank_judge"]))
    assert scorer_digest(rank) == scorer_digest(find_metrics(["rank"])[0].scorer("cpu"))
    assert scorer_digest(rank) != scorer_digest(judge)
    assert scorer_digest(lambda pictures: pictures.mean((1, 2, 3))) == ""
    niqe = torch.nn.Module()
    niqe.model = torch.ones(3)  # a plain attribute, as pyiqa keeps some parameters
    before = scorer_digest(Enlarged(niqe, 1, "mirror"))
    niqe.model[0] = 2.0
    assert scorer_digest(Enlarged(niqe, 1, "mirror")) != before


def test_the_number_types_of_a_scorer_are_those_of_its_tensors() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).half())
    assert scorer_dtypes(network) == "float16, float32"
    assert scorer_dtypes(torch.nn.Linear(2, 2).double()) == "float64"
    assert scorer_dtypes(lambda pictures: pictures.mean((1, 2, 3))) == "float32"


def test_mirroring_keeps_pixels_and_bicubic_keeps_the_shape() -> None:
    picture = torch.rand(1, 3, 5, 7)
    mirrored = enlarge(picture, 12, "mirror")
    assert mirrored.shape == (1, 3, 12, 12)
    torch.testing.assert_close(mirrored[..., :5, :7], picture)
    torch.testing.assert_close(mirrored[..., 5:10, :7], picture.flip(2))
    assert enlarge(picture, 10, "bicubic").shape == (1, 3, 10, 14)
    assert enlarge(picture, 5, "mirror") is picture


@pytest.mark.parametrize("kind", KINDS)
def test_distortions_are_pure_seeded_and_grow_with_strength(kind: str) -> None:
    picture = drawn_picture(0, 64)
    kept = picture.copy()
    errors = [
        float(np.abs(distort(picture, kind, strength, 3).astype(float) - picture).mean())
        for strength in (0.0, 0.5, 1.0)
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[2]
    np.testing.assert_array_equal(picture, kept)
    np.testing.assert_array_equal(distort(picture, kind, 0.5, 3), distort(picture, kind, 0.5, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASIC)
@pytest.mark.parametrize("name", ["rank", "rank_judge"])
def test_rank_networks_order_severities_of_photographs_they_never_saw(name: str, kind: str) -> None:
    scorer = find_metrics([name])[0].scorer("cpu")
    orders = [_order(scorer, picture[:256, :256], kind) for picture in _photographs()]
    assert np.mean(orders) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["piqe", "niqe"])
@pytest.mark.parametrize("kind", ["blur", "downsample"])
def test_classic_metrics_order_loss_of_detail(name: str, kind: str) -> None:
    metric = find_metrics([name])[0]
    orders = [-_order(metric.scorer("cpu"), picture[:256, :256], kind) for picture in _photographs()]
    assert np.mean(orders) >= 0.8
