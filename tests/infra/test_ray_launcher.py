"""The launcher's file passes Ray's own validation and keeps the cluster closed."""

from typing import Any

import jsonschema
import pytest

from tests.infra.strict_schema import ROOT, load_manifests

(CLUSTER,) = load_manifests(ROOT / "infra" / "ray" / "cluster.yaml")


def validate(config: dict[str, Any]) -> None:
    """Ray's own defaults and check, with which `ray up` starts; needs no cloud."""
    util = pytest.importorskip("ray.autoscaler._private.util", reason="Ray's launcher is not installed")
    util.validate_config(util.prepare_config(config))


def test_ray_accepts_the_file() -> None:
    validate(CLUSTER)


def test_ray_refuses_a_planted_typo() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate({**CLUSTER, "max_wrokers": 3})


def test_the_cluster_is_closed() -> None:
    assert "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    head = " ".join(CLUSTER["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for kind in CLUSTER["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert kind["node_config"]["IamInstanceProfile"], "rights come from the machine, not from keys in a file"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])


def test_every_machine_has_the_workspace_of_the_recipes() -> None:
    assert any(option.startswith("--env IQPIR_WORKSPACE=s3://") for option in CLUSTER["docker"]["run_options"])


def test_no_token_is_part_of_a_command() -> None:
    commands = (
        CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"] + CLUSTER["docker"]["run_options"]
    )
    assert not [command for command in commands if "RAY_AUTH_TOKEN=" in command]
    assert CLUSTER["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_node_types_fit_the_bounds() -> None:
    kinds = CLUSTER["available_node_types"]
    assert CLUSTER["head_node_type"] in kinds
    assert kinds[CLUSTER["head_node_type"]]["resources"]["CPU"] >= 1, "drivers of jobs run on the head"
    assert sum(kind["max_workers"] for kind in kinds.values()) <= CLUSTER["max_workers"]
