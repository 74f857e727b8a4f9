"""``jobs/demo.py`` on a user's own pictures: the whole chain, then the whole chain skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

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
