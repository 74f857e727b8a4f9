"""Recipes: each section is understood by its job, and the sections of one recipe fit together."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from iqpir.config import preset
from pipeline.command import JOBS, SHARED
from tests.jobs.scripts import job
from tests.source_files import REPOSITORY, source_files

RECIPES = [path for path in source_files("*.yaml") if path.parent == REPOSITORY / "jobs/recipes"]
HEADER = ("Command", "Hardware", "Time", "Expected")
SECTIONS = [(path, name) for path in RECIPES for name in yaml.safe_load(path.read_text()) if name != SHARED]


def named(value: Any) -> str | None:
    return value.stem if isinstance(value, Path) else None


def test_recipes_were_found() -> None:
    assert {"tiny32", "tiny64", "faces512"} <= {path.stem for path in RECIPES}
    assert len(SECTIONS) >= 9 * len(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_opens_with_what_it_takes_and_what_it_gives(path: Path) -> None:
    comment = path.read_text().split("\nall:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    found = re.findall(r"^# (\w+): +(\S.*)$", comment, re.MULTILINE)
    assert tuple(key for key, _ in found) == HEADER
    assert f"jobs/recipes/{path.name}" in found[0][1] or "make demo" in found[0][1]


@pytest.mark.parametrize(("path", "section"), SECTIONS, ids=named)
def test_each_section_is_a_configuration_of_its_job(path: Path, section: str) -> None:
    assert section in JOBS
    config = job(section).parse("--config", str(path))
    written = yaml.safe_load(path.read_text())[section]
    for key, value in written.items():
        if not isinstance(value, dict | str):
            assert getattr(config, key) == value


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_each_section_reads_what_an_earlier_one_writes(path: Path) -> None:
    """Names of runs, labels, views and metrics agree; else the chain would stop in the middle."""
    configs = {name: job(name).parse("--config", str(path)) for owner, name in SECTIONS if owner == path}
    stage1, stage2 = configs["stage1"], configs["stage2"]
    assert len({config.corpus for config in configs.values() if hasattr(config, "corpus")}) == 1
    assert set(configs["label"].metrics) <= set(configs["score"].metrics)
    assert set(stage2.prior) <= set(configs["label"].metrics)
    assert configs["curate"].labels == configs["label"].name
    assert {stage1.view, stage2.view, configs["evaluate"].view} == {configs["curate"].name}
    assert configs["encode"].stage1 == stage2.stage1 == stage1.run_url
    assert configs["evaluate"].checkpoint == configs["register"].checkpoint == stage2.run_url
    assert configs["register"].evaluation.startswith(stage2.run_url)
    assert stage1.preset == stage2.preset
    if "preflight" in configs:
        assert configs["preflight"].metrics == configs["score"].metrics
        for name in ("workers", "preset", "runs", "corpus", "feed"):
            assert getattr(configs["preflight"], name) == getattr(stage2, name), name
    if "export" in configs:
        assert configs["export"].size == preset(stage1.preset).image_size and configs["export"].view == stage1.view
    if "stage3" in configs:
        assert configs["stage3"].stage2 == stage2.run_url and configs["stage3"].view == stage2.view


def test_a_training_of_a_recipe_can_be_started_without_ray() -> None:
    config = job("stage2").parse("--config", str(REPOSITORY / "jobs/recipes/tiny64.yaml"), "--launcher", "local")
    assert config.launcher == "local" and config.preset == "tiny64"
