"""The Dockerfiles copy what exists, install what is tested, and end as a user that is not root."""

import fnmatch
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.infra.strict_schema import ROOT

DOCKERFILES = [ROOT / "infra" / "docker" / "Dockerfile", ROOT / "infra" / "mlflow" / "Dockerfile"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of every logical line."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines if line.strip()]


def pins(path: Path) -> dict[str, str]:
    """name -> version of every pinned line."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]+\])?==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def reaches_the_engine(source: str) -> bool:
    """Whether .dockerignore lets ``source`` through; the last pattern that fits decides, as Docker has it."""
    allowed = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch.fnmatch(part, pattern) for part in (source, source.split("/")[0])):
                allowed = line.startswith("!")
    return allowed


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_every_copied_source_exists_and_reaches_the_engine(path: Path) -> None:
    copied = [source for verb, rest in instructions(path) if verb == "COPY" for source in rest.split()[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert reaches_the_engine(source), f"{source} is kept away by .dockerignore"


def test_private_and_large_things_do_not_reach_the_engine() -> None:
    for source in (".git", ".venv", "tests", "workspace", "infra/docker/.env", "mlflow.db"):
        assert not reaches_the_engine(source), source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_is_pinned_and_not_root(path: Path) -> None:
    steps = instructions(path)
    base = dict(steps)["FROM"]
    if base == "${BASE}":
        base = next(rest for verb, rest in steps if verb == "ARG" and rest.startswith("BASE=")).removeprefix("BASE=")
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base), base
    users = [rest for verb, rest in steps if verb == "USER"]
    assert users[-1] == "1000:1000", "a number, so that Kubernetes can check it"
    assert [verb for verb, _ in steps].index("USER") > max(i for i, (verb, _) in enumerate(steps) if verb == "RUN")
    assert "ADD" not in [verb for verb, _ in steps]


def test_the_image_has_the_versions_that_are_tested() -> None:
    text = DOCKERFILES[0].read_text()
    makefile = (ROOT / "Makefile").read_text()
    constraints = pins(ROOT / "constraints.txt")
    for name, where in (
        ("torch", makefile),
        ("uv", makefile),
        ("torchvision", (ROOT / "constraints.txt").read_text()),
    ):
        in_image = re.findall(rf"\b{name}==(\d[\d.]*)", text)
        assert in_image
        assert set(in_image) <= set(re.findall(rf"\b{name}==(\d[\d.]*)", where)), name
    assert pins(ROOT / "infra" / "mlflow" / "requirements.txt")["mlflow"] == constraints["mlflow"]
    extras = re.search(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)
    assert extras
    assert set(extras.group(1).split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_image_has_the_perceptual_loss_that_recipes_name() -> None:
    recipes = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "jobs/recipes").glob("*.yaml"))]
    wanted = {section.get("perceptual") for recipe in recipes for section in recipe.values()}
    assert "lpips" in wanted
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILES[0].read_text(), re.MULTILINE)
    installed = [entry for extra in extras.split(",") for entry in PROJECT["optional-dependencies"][extra]]
    assert "lpips" in {Requirement(entry).name for entry in installed}


def test_every_direct_dependency_is_pinned_to_an_allowed_version() -> None:
    constraints = pins(ROOT / "constraints.txt")
    listed = [
        *PROJECT["dependencies"],
        *(entry for extra in PROJECT["optional-dependencies"].values() for entry in extra),
    ]
    for requirement in map(Requirement, listed):
        if requirement.name == "torch":
            continue
        assert requirement.name.lower() in constraints, f"{requirement} has no pin"
        assert requirement.specifier.contains(constraints[requirement.name.lower()]), requirement


def test_the_constraints_fit_a_cpu_and_a_cuda_torch() -> None:
    assert not {
        name for name in pins(ROOT / "constraints.txt") if name in {"torch", "triton"} or name.startswith("nvidia-")
    }


@pytest.mark.parametrize("script", [".ci/run", "infra/mlflow/serve.sh"])
def test_scripts_are_strict_bash(script: str) -> None:
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    checked = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_ci_runs_the_one_test_command_and_can_be_executed() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().splitlines()[-1] == "make test"


@pytest.mark.parametrize(
    "missing",
    [
        "MLFLOW_BACKEND_STORE_URI",
        "MLFLOW_ALLOWED_HOSTS",
        "MLFLOW_AUTH_ADMIN_PASSWORD",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
    ],
)
def test_the_mlflow_server_does_not_start_with_a_setting_missing(missing: str, tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(tmp_path),
        "MLFLOW_BACKEND_STORE_URI": "sqlite:///unused.db",
        "MLFLOW_ARTIFACTS_DESTINATION": "unused",
        "MLFLOW_ALLOWED_HOSTS": "localhost",
        "MLFLOW_AUTH_ADMIN_USERNAME": "someone",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a-long-password",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-key",
    }
    del environment[missing]
    script = ROOT / "infra" / "mlflow" / "serve.sh"
    started = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=30)
    assert started.returncode == 1
    assert missing in started.stderr
    assert not list(tmp_path.iterdir())


def make(*arguments: str) -> str:
    shown = subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_make_help_lists_the_targets_of_the_readme() -> None:
    listed = {line.split()[1] for line in make("help").splitlines()}
    assert {"env", "check", "test", "demo", "format", "clean"} <= listed


def test_make_demo_passes_the_users_pictures_on() -> None:
    # -o: the environment counts as up to date, whatever it is.
    stamp = re.search(r"(\.venv/\.installed-\S+)", make("-n", "-p", "demo"))
    assert stamp
    commands = make("-n", "-o", stamp.group(1), "demo", "INPUT=s3://bucket/pictures")
    assert shlex.split(commands.strip().splitlines()[-1])[1:] == ["jobs/demo.py", "--input", "s3://bucket/pictures"]
    spaced = make("-n", "-o", stamp.group(1), "demo", "INPUT=/my photos/it's 2026")
    assert shlex.split(spaced.strip().splitlines()[-1])[1:] == ["jobs/demo.py", "--input", "/my photos/it's 2026"]
    assert "--input" not in make("-n", "-o", stamp.group(1), "demo")
