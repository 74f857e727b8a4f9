"""Preflight finds what would stop a run, says it in one line each, and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest

from iqpir.errors import UsageError
from pipeline.command import JOBS, parse
from pipeline.preflight import PreflightConfig, preflight
from pipeline.preflight_checks import check_cluster, check_metrics, check_network, check_versions
from pipeline.preflight_recipe import config_type_of
from pipeline.torchvision_ops import ensure_torchvision_operators
from pipeline.training.feed import FeedConfig
from pipeline.training.launch import Workers
from tests.jobs.scripts import job


def config(tmp_path: Path, **changed: Any) -> PreflightConfig:
    values: dict[str, Any] = {
        "preset": "tiny32",
        "runs": str(tmp_path / "runs"),
        "launcher": "local",
        "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
    }
    return PreflightConfig(**{**values, **changed})


@pytest.mark.slow
def test_a_sound_place_passes_and_keeps_nothing_of_the_probes(labelled_corpus: Any, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    made = labelled_corpus()
    before = {entry.path for entry in made.corpus.storage.list()}
    result = preflight(config(tmp_path, corpus=made.url, view="small"))
    assert [check.name for check in result.checks if not check.ok] == []
    assert result.exit_code == 0
    assert {check.name for check in result.checks} >= {
        *("versions", "imports", "network", "corpus", "corpus storage"),
        *("samples", "runs storage", "tracking", "registry"),
    }
    assert {entry.path for entry in made.corpus.storage.list()} == before
    assert not list((tmp_path / "runs").rglob("*.*"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert MlflowClient(uri, uri).search_registered_models() == []


@pytest.mark.slow
def test_a_metric_without_weights_is_named_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_torchvision_operators()
    assert check_metrics(["rank"], "").startswith("rank (")
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"brisque_svm_weights\.pth"):
        check_metrics(["rank", "brisque"], "")


def test_every_check_runs_and_each_failure_is_named(labelled_corpus: Any, tmp_path: Path) -> None:
    made = labelled_corpus(sides=(48, 48, 48), held_back=1)
    (tmp_path / "file").write_text("in the way")
    result = preflight(
        config(
            tmp_path,
            corpus=made.url,
            view="small",
            feed=FeedConfig(fit="exact"),
            runs=str(tmp_path / "file" / "runs"),
            tracking_uri="http://127.0.0.1:9",
            registry=False,
            network={"image_sise": 3},
        )
    )
    failed = {check.name: check.detail for check in result.checks if not check.ok}
    assert set(failed) == {"network", "samples", "runs storage", "tracking"}
    assert "image_sise" in failed["network"]
    assert "48x48" in failed["samples"]
    assert "127.0.0.1:9" in failed["tracking"]
    assert result.exit_code == 1
    assert all("\n" not in check.detail for check in result.checks)


@pytest.mark.slow
def test_every_section_of_a_recipe_is_checked(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
        all: {corpus: nowhere, preset: tiny32, view: small}
        score: {metrics: [no-such-metric]}
        curate: {nmae: small, labels: default}
        stage1: {name: one, perceptual: ssim}
        stage2: {name: two, stage1: one, batch_size: 5, workers: {count: 2}}
        """
    )
    argv = ["--config", str(recipe), "--launcher", "local", "--no-registry", "--no-corpus_writable"]
    argv += ["--runs", str(tmp_path / "runs"), "--tracking_uri", f"sqlite:///{tmp_path}/mlflow.db"]
    config = parse(PreflightConfig, argv, "preflight")
    assert (config.recipe, config.preset) == (str(recipe), "tiny32")
    found = {check.name: check for check in preflight(config).checks if check.name.startswith("recipe")}
    assert {name for name, check in found.items() if check.ok} == {"recipe: stage1"}
    assert "no-such-metric" in found["recipe: score"].detail
    assert "Did you mean name" in found["recipe: curate"].detail
    assert "cannot be shared evenly by 2 workers" in found["recipe: stage2"].detail
    assert "perceptual term ssim" in found["recipe: stage1"].detail


@pytest.mark.slow
def test_a_recipe_section_is_read_as_its_job_reads_it() -> None:
    assert {name: config_type_of(name) for name in JOBS} == {name: job(name).config_type for name in JOBS}


def test_an_unsealed_corpus_fails(tmp_path: Path) -> None:
    result = preflight(config(tmp_path, corpus=str(tmp_path / "nothing"), registry=False))
    assert "corpus" in {check.name for check in result.checks if not check.ok}


def test_old_and_absent_packages_are_named() -> None:
    assert "torch" in check_versions()
    with pytest.raises(UsageError, match=r"torch .* is older than 999"):
        check_versions({"torch": "999"})
    with pytest.raises(UsageError, match="no-such-package is not installed"):
        check_versions({"no-such-package": "1"})
    assert "pillow" in check_versions({"pillow": "9.10"})  # compared as numbers, not as text


def test_the_network_is_counted_without_memory() -> None:
    tiny = check_network("tiny32", {})
    large = check_network("iqpir512", {})
    assert "32 px" in tiny
    assert "512 px" in large

    def parameters(text: str) -> float:
        return float(text.split(" M parameters")[0].split()[-1])

    assert parameters(large) > 20 * parameters(tiny)


@pytest.mark.slow
def test_workers_need_room_on_single_nodes(local_ray: None) -> None:
    assert "room for" in check_cluster(Workers(count=2, cpus=2))
    with pytest.raises(UsageError, match=r"room for 0 of 1 workers"):
        check_cluster(Workers(count=1, cpus=64))
    with pytest.raises(UsageError, match="GPUs"):
        check_cluster(Workers(count=1, gpus="yes"))
