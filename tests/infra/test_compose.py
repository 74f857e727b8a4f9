"""The compose file: what Docker itself says of it, and what it promises about ports, passwords and rights."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.infra.strict_schema import ROOT, load_manifests

FILE = ROOT / "infra" / "docker" / "compose.yaml"
EXAMPLE = FILE.with_name(".env.example")
(COMPOSE,) = load_manifests(FILE)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PLACEHOLDER = re.compile(r"\$\{([A-Z0-9_]+):\?[^}]+\}")
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|USERNAME", re.IGNORECASE)


def example_variables() -> dict[str, str]:
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_services_of_the_design_are_there() -> None:
    assert {"ray-head", "ray-worker", "mlflow", "postgres", "storage", "buckets"} == set(SERVICES)


def test_docker_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker client with the compose plug-in here")
    environment = tmp_path / "env"
    environment.write_text("".join(f"{name}=value\n" for name in example_variables()))
    command = [
        docker,
        "compose",
        "--env-file",
        str(environment),
        "-f",
        str(FILE),
        "config",
        "--format",
        "json",
    ]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert set(json.loads(shown.stdout)["services"]) == set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_only(name: str) -> None:
    service = SERVICES[name]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service.get("network_mode") != "host"


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_rights_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileged")
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))
    if name == "storage":
        # Its image starts as root only to hand the data folder to uid 1000.
        assert set(service["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}
    else:
        assert "cap_add" not in service
        assert service["user"] not in {"", "0", "root", "0:0"}
        assert service["read_only"] is True


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_bounded_and_pinned(name: str) -> None:
    service = SERVICES[name]
    assert {"cpus", "memory"} == set(service["deploy"]["resources"]["limits"])
    image, _, tag = service["image"].rpartition(":")
    assert image
    assert tag not in {"", "latest"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_what_it_needs(name: str) -> None:
    service = SERVICES[name]
    # `buckets` runs once and ends.
    assert ("healthcheck" in service) == (name != "buckets")
    for needed, condition in service.get("depends_on", {}).items():
        ends = "service_completed_successfully" if needed == "buckets" else "service_healthy"
        assert condition == {"condition": ends}


def test_no_password_has_a_default() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if SECRET_NAME.search(key):
                assert PLACEHOLDER.fullmatch(value), f"{name}: {key}"
    assert not re.search(r"\$\{[A-Z0-9_]+(:?-|\})", FILE.read_text()), "a variable may be missing or have a default"


def test_the_example_names_every_variable_and_no_value() -> None:
    used = set(PLACEHOLDER.findall(FILE.read_text()))
    assert set(example_variables()) == used
    assert set(example_variables().values()) == {""}


def test_the_filled_in_file_never_leaves_the_machine() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    asked = subprocess.run([git, "-C", str(ROOT), "check-ignore", "infra/docker/.env"], capture_output=True)
    assert asked.returncode == 0, "infra/docker/.env would be committed"
    assert "**/.env" in (ROOT / ".dockerignore").read_text().splitlines()


def test_ray_asks_for_a_token_everywhere() -> None:
    for name in ("ray-head", "ray-worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_the_nodes_work_in_a_bucket_that_is_made_for_them() -> None:
    for name in ("ray-head", "ray-worker"):
        workspace = SERVICES[name]["environment"]["IQPIR_WORKSPACE"]
        assert workspace.removeprefix("s3://") in SERVICES["buckets"]["command"]


def test_nothing_shortens_the_requests_that_carry_a_model() -> None:
    """Values of the environment win over what a job sets: seconds would end every upload."""
    settings = {key for service in SERVICES.values() for key in service.get("environment", {})}
    assert not {key for key in settings if key.startswith("MLFLOW_HTTP_REQUEST")}


def test_the_object_store_of_models_is_not_that_of_pictures() -> None:
    assert SERVICES["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].startswith("s3://mlflow/")
    assert SERVICES["buckets"]["command"][-2:] == ["iqpir", "mlflow"]


def test_what_is_built_can_be_built() -> None:
    builds = [service["build"] for service in SERVICES.values() if "build" in service]
    assert builds
    for build in builds:
        context = (FILE.parent / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).is_file()
