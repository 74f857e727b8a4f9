"""``jobs/demo.py`` on a user's own pictures: the whole chain, then the whole chain skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.demo import Steps, runs_of, shortfalls, show
from pipeline.evaluate import EvaluateResult
from pipeline.stage1 import Stage1Training
from pipeline.stopping import StoppedError
from pipeline.training.config import TrainResult
from tests.chain import write_pictures

REPOSITORY = Path(__file__).parents[2]
SHORT = {"steps": 8, "checkpoint_every": 4, "log_every": 4, "batch_size": 4}


def smoke_recipe(path: Path) -> Path:
    """The recipe of the demo with the rank network alone, few steps and few pictures."""
    recipe = yaml.safe_load((REPOSITORY / "jobs/recipes/tiny32.yaml").read_text())
    recipe["score"]["metrics"] = recipe["label"]["metrics"] = ["rank"]
    recipe["curate"]["holdout"] = 0.25
    recipe["stage1"] |= SHORT
    recipe["stage1"]["stage"]["warmup_steps"] = 2
    recipe["stage2"] |= {**SHORT, "launcher": "local"}
    recipe["evaluate"]["samples"] = 6
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_demo(folder: Path) -> tuple[dict[str, Any], str]:
    arguments = ["--input", folder / "pictures", "--folder", folder / "demo", "--recipe", folder / "recipe.yaml"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "jobs/demo.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**environment, "HOME": str(folder / "home"), "IQPIR_WORKSPACE": str(folder / "workspace")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result, done.stderr


@pytest.mark.slow
def test_the_demo_ends_with_its_documented_line_and_resumes(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 8)
    (pictures / "cut.png").write_bytes((pictures / "00.png").read_bytes()[:200])
    smoke_recipe(tmp_path / "recipe.yaml")
    first, told = run_demo(tmp_path)
    assert {"quality", "dial", "dial_spearman", "model_uri", "tracking_uri", "corpus", "report", "seconds"} <= set(
        first
    )
    assert first["quality"].keys() == {"lq", "hq", "restored"}
    assert [requested for requested, _ in first["dial"]] == [round(0.05 + 0.1 * step, 2) for step in range(10)]
    assert all(0 <= measured <= 1 for _, measured in first["dial"])
    assert -1 <= first["dial_spearman"] <= 1
    assert first["model_uri"] == "models:/iqpir/1"
    assert first["tracking_uri"] == f"sqlite:///{tmp_path}/demo/mlflow.db"
    assert first["corpus"] == str(tmp_path / "demo" / "corpus")
    assert first["skipped"] == {}
    assert "<html" in Path(first["report"]).read_text()[:500].lower()
    assert len(list(Path(first["restored"]).glob("*.png"))) == 6
    assert {name: "dial " + str(name) in told for name in (0.1, 0.5, 0.95)} == {0.1: True, 0.5: True, 0.95: True}
    # Eight steps teach nothing: what is asked of a whole demo is told as missed, in the table and in the last line.
    assert first["missed"] and all(f"not what the demo is to show: {reason}" in told for reason in first["missed"])
    trained = json.loads((tmp_path / "demo/runs/tiny32-stage2/result.json").read_text())["mlflow_run"]
    version = MlflowClient(first["tracking_uri"]).get_model_version("iqpir", "1")
    assert (version.run_id, version.tags["training_run"]) == (trained, trained)
    assert "held-back pictures" in told and "mlflow ui --backend-store-uri" in told
    assert not (tmp_path / "home" / ".ray").exists(), "a token there would change the user's next ray start"
    assert not (tmp_path / "home" / ".iqpir").exists()

    second, told = run_demo(tmp_path)
    assert {name: second[name] for name in ("quality", "dial", "psnr", "model_uri", "corpus")} == {
        name: first[name] for name in ("quality", "dial", "psnr", "model_uri", "corpus")
    }
    for step in ("shard", "score", "encode", "stage1", "stage2", "register", "restore"):
        assert step in second["skipped"], second["skipped"]
        assert f"{step}: skipped" in told
    assert second["skipped"]["stage1"] == "all 8 steps"
    assert second["seconds"] < first["seconds"]


def evaluated(**changes: Any) -> EvaluateResult:
    """An evaluation that shows all that a demo is to show, but for ``changes``."""
    figures: dict[str, Any] = {
        "digest": "d",
        "quality": {"lq": 0.3, "hq": 0.5, "restored": 0.4},
        "dial": [[0.05, 0.3], [0.5, 0.35], [0.95, 0.4]],
        "dial_spearman": 0.9,
        "dial_range": 0.08,
        "psnr": {"lq": 25.0, "restored": 22.0},
        "ssim": {"lq": 0.8, "restored": 0.7},
        "metrics": {},
        "samples": 6,
        "checkpoint": "run",
        "lineage": {},
        "output": "run/evaluation",
        "outside": {},
        "outside_metrics": [],
        "further": [{"requested": 0.1, "quality": 0.123, "psnr": 24.56, "ssim": 0.789}],
    }
    return EvaluateResult(**{**figures, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quality": {"lq": 0.4, "hq": 0.5, "restored": 0.4}}, "restored pictures have the quality 0.400"),
        ({"dial_spearman": 0.89}, "Spearman correlation is 0.89"),
        ({"dial_range": 0.079}, "by 0.079, less than 0.08"),
        ({"dial_range": float("nan")}, "by nan"),
    ],
)
def test_a_demo_says_what_it_did_not_show(
    changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shortfalls(evaluated()) == []
    (found,) = shortfalls(evaluated(**changes))
    assert reason in found
    show(evaluated(**changes), "models:/iqpir/1", "report.html", "sqlite:///mlflow.db")
    assert f"not what the demo is to show: {found}" in capsys.readouterr().err


def test_the_rows_of_the_table_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show(evaluated(), "models:/iqpir/1", "report.html", "sqlite:///mlflow.db")
    (row,) = [line for line in capsys.readouterr().err.splitlines() if "dial 0.1" in line]
    assert [word for word in row.split() if word[0].isdigit()] == ["0.1", "0.123", "24.56", "0.789"]


def test_trainings_on_a_grown_view_have_a_folder_of_their_own() -> None:
    assert runs_of("demo", "crops@v0001") == "demo/runs" and runs_of("demo", "crops@v0012") == "demo/runs/v0012"


def test_a_chain_ends_with_the_training_that_was_stopped(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("corpus: c\nview: v\nname: one\n")

    def train_stage1(training: Stage1Training) -> TrainResult:
        return TrainResult(training.run_url, "", "stopped", 3, 0, {}, "", {}, 1.0)

    with pytest.raises(StoppedError, match="stage1 was stopped"):
        Steps(str(recipe)).run(train_stage1, Stage1Training)
