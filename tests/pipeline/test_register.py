"""The registry holds what training produced: once, proven in a clean process, or not as candidate."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from iqpir.errors import UsageError, VerificationError
from iqpir.networks.restoration_network import build
from iqpir.pixels import encode_png
from iqpir.restorer import Restorer
from iqpir.training.checkpoint import weights_digest
from pipeline.register import CANDIDATE, SELF_CHECK, RegisterConfig, RegisterResult, register
from pipeline.registry.gate import evaluation_tags
from pipeline.registry.official import OfficialConfig, official_checkpoint
from pipeline.registry.registered import fetch_registered
from pipeline.restore import RestoreConfig, restore
from pipeline.tracking.runs import open_run, tracking_location
from tests.conftest import draw_picture
from tests.pipeline.tiny_checkpoint import write_checkpoint

EVALUATION = {
    "digest": "e1",
    "quality": {"lq": 0.3, "hq": 0.8, "restored": 0.6},
    "dial": [[0.05, 0.3], [0.5, 0.5], [0.95, 0.6]],
    "dial_spearman": 1.0,
    "dial_range": 0.3,
    "psnr": {"lq": 20.0, "restored": 22.5},
    "ssim": {"lq": 0.5, "restored": 0.6},
    "metrics": {},
    "outside": {"lq": 0.3, "hq": 0.7, "restored": 0.5, "dial_spearman": 0.9, "dial_range": 0.1},
    "outside_metrics": ["niqe", "piqe"],
}


class Registered:
    """One version in a database, made once for the module."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoint = write_checkpoint(root / "checkpoint")
        self.evaluation = root / "evaluation.json"
        self.evaluation.write_text(json.dumps(EVALUATION))
        self.uri = tracking_location("", root)
        open_run(self.uri, "iqpir", "training@1", "training", {}, {})
        self.client = MlflowClient(self.uri)
        self.config = RegisterConfig(
            checkpoint=str(self.checkpoint),
            tracking_uri=self.uri,
            run="training@1",
            evaluation=str(self.evaluation),
        )
        self.result: RegisterResult = register(self.config)

    def artifacts(self) -> Path:
        version = self.client.get_model_version("iqpir", "1")
        location: str = self.client.get_model_version_download_uri("iqpir", version.version)
        return Path(location.removeprefix("file://"))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    return Registered(tmp_path_factory.mktemp("register"))


@pytest.mark.slow
def test_a_checkpoint_becomes_the_candidate_with_its_lineage(registered: Registered) -> None:
    result = registered.result
    assert result.created and result.version == "1" and result.max_difference <= 1
    version = registered.client.get_model_version_by_alias("iqpir", CANDIDATE)
    assert str(version.version) == "1" == result.version
    expected = {
        "lineage.view": "hq@v0001",
        "lineage.calibration": "c0ffee",
        "stage1_digest": "autoencoder",
        "weights_digest": "weights-2603",
        "stage": "stage2",
        "step": "7",
        "checkpoint_digest": result.checkpoint_digest,
        "package": result.package,
        "eval.digest": "e1",
        "eval.quality.restored": "0.6",
        "eval.outside.restored": "0.5",
        "eval.outside.metrics": "niqe piqe",
        "eval.psnr.restored": "22.5",
        "self_check": f"passed {result.max_difference}",
    }
    assert expected.items() <= version.tags.items()
    run = registered.client.get_run(version.run_id)
    assert run.data.tags["run_key"] == "training@1"
    (output,) = run.outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"


@pytest.mark.slow
def test_registering_again_gives_the_same_version(registered: Registered) -> None:
    registered.client.delete_registered_model_alias("iqpir", CANDIDATE)  # as if killed before the alias moved
    again = register(registered.config)
    assert (again.version, again.created) == ("1", False)
    assert len(registered.client.search_model_versions("name = 'iqpir'")) == 1
    assert str(registered.client.get_model_version_by_alias("iqpir", CANDIDATE).version) == "1"


@pytest.mark.slow
def test_what_was_uploaded_before_a_crash_is_not_uploaded_again(registered: Registered) -> None:
    experiment = registered.client.get_experiment_by_name("iqpir").experiment_id
    before = {model.model_id for model in registered.client.search_logged_models([experiment])}
    other = register(dataclasses.replace(registered.config, name="other"))
    assert other.created
    assert {model.model_id for model in registered.client.search_logged_models([experiment])} == before
    source = registered.client.get_model_version("other", "1").source
    assert source.removeprefix("models:/") in before


@pytest.mark.slow
def test_a_version_that_needs_the_repository_never_becomes_candidate(registered: Registered) -> None:
    client, package = registered.client, registered.result.package
    code = registered.artifacts() / "code" / package / "restorer.py"
    text = code.read_text()
    client.delete_model_version_tag("iqpir", "1", SELF_CHECK)
    client.delete_registered_model_alias("iqpir", CANDIDATE)
    try:
        code.write_text(text.replace(f"from {package}.errors", "from iqpir.errors", 1))
        with pytest.raises(VerificationError, match="No module named 'iqpir'"):
            register(registered.config)
        assert client.get_model_version("iqpir", "1").tags[SELF_CHECK].startswith("failed")
        with pytest.raises(MlflowException, match="alias"):
            client.get_model_version_by_alias("iqpir", CANDIDATE)
    finally:
        code.write_text(text)
        client.set_model_version_tag("iqpir", "1", SELF_CHECK, "passed 0")
        client.set_registered_model_alias("iqpir", CANDIDATE, "1")


@pytest.mark.slow
def test_the_weights_can_be_fetched_without_running_the_registrys_code(registered: Registered) -> None:
    canary = registered.root / "canary"
    evil = registered.artifacts() / "pyfunc_model.py"
    text = evil.read_text()
    evil.write_text(f"open({str(canary)!r}, 'w').close()\n" + text)
    try:
        folder = fetch_registered(f"models:/iqpir@{CANDIDATE}", registered.uri)
        source = registered.root / "pictures"
        source.mkdir()
        (source / "1.png").write_bytes(encode_png(draw_picture(1, 32)))
        restore(
            RestoreConfig(
                model=f"models:/iqpir@{CANDIDATE}",
                input=str(source),
                output=str(registered.root / "restored"),
                quality=0.5,
                tracking_uri=registered.uri,
            )
        )
    finally:
        evil.write_text(text)
    picture = encode_png(draw_picture(1, 32))
    ours = Restorer.load(registered.checkpoint).restore(picture, quality=0.5)
    assert Restorer.load(folder).restore(picture, quality=0.5) == ours
    assert (registered.root / "restored" / "1.png").read_bytes() == ours
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "package.json"])
def test_altered_weights_are_refused(registered: Registered, file: str) -> None:
    path = registered.artifacts() / "artifacts" / "model" / file
    data = path.read_bytes()
    path.write_bytes(data[:-3] + b" " + data[-2:])
    try:
        with pytest.raises(VerificationError, match=file.replace(".", r"\.")):
            fetch_registered("models:/iqpir/1", registered.uri)
    finally:
        path.write_bytes(data)


@pytest.mark.slow
def test_an_official_file_becomes_a_version(registered: Registered, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = build("tiny32")
    torch.save({"params_ema": network.state_dict()}, tmp_path / "net.pth")
    official = OfficialConfig(file=str(tmp_path / "net.pth"), alpha=0.5, hq_threshold=0.9, transformer_heads=4)
    config = RegisterConfig(official=official, name="published", tracking_uri=registered.uri)
    result = register(config)
    assert result.created and result.max_difference <= 1
    version = registered.client.get_model_version("published", "1")
    assert (version.tags["stage"], version.tags["lineage.official"]) == ("official", "net.pth")
    assert version.tags["weights_digest"] == weights_digest(network.state_dict())
    folder = fetch_registered("models:/published/1", registered.uri)
    found = Restorer.load(folder).network.config
    assert (found.alpha, found.hq_threshold) == (0.5, 0.9), "what the file does not tell is in the model"
    again = register(config)
    assert (again.version, again.created) == ("1", False)


def test_an_official_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for given in ({}, {"checkpoint": "run", "official": OfficialConfig(file="net.pth")}):
        with pytest.raises(UsageError, match="Either a checkpoint or an official file"):
            RegisterConfig(**given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"no checkpoint file at .*net\.pth"):
        official_checkpoint(OfficialConfig(file=str(tmp_path / "net.pth")), tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=r"model\.safetensors"):
        register(RegisterConfig(checkpoint=str(checkpoint), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["", "a/b", "it's", "a:b"])
def test_names_that_the_registry_or_its_search_cannot_take_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a registered model"):
        RegisterConfig(checkpoint="somewhere", name=name)


def test_an_evaluation_of_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**EVALUATION, "weights_digest": "theirs"}))
    with pytest.raises(VerificationError, match="other weights"):
        evaluation_tags(str(path), {"weights_digest": "ours"})
    assert evaluation_tags(str(path), {"weights_digest": "theirs"})["eval.digest"] == "e1"


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"digest": "e1"})])
def test_what_is_no_evaluation_is_a_usage_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UsageError, match=r"jobs/evaluate\.py"):
        evaluation_tags(str(tmp_path / "evaluation.json"), {})
