"""The manifests are what KubeRay accepts, to the letter, and what the operator checks beyond the schema."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.strict_schema import ROOT, crd_folder, errors, load_manifests, load_schema

KUBERAY = ROOT / "infra" / "kuberay"
FILES = sorted(KUBERAY.glob("*.yaml"))
MANIFESTS = [(path, manifest) for path in FILES for manifest in load_manifests(path)]
RAY = [(path, manifest) for path, manifest in MANIFESTS if manifest["apiVersion"] == "ray.io/v1"]
IDS = [f"{path.name}:{manifest['kind']}" for path, manifest in RAY]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return dict(spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec)


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    folder = crd_folder()
    if folder is None:
        pytest.skip("KubeRay's definitions are not here: set IQPIR_KUBERAY_CRDS to a folder with ray.io_*.yaml")
    return {kind: load_schema(folder, kind, "v1") for kind in ("RayCluster", "RayJob")}


def test_the_expected_kinds_are_shipped() -> None:
    kinds = {(path.name, manifest["kind"]) for path, manifest in MANIFESTS}
    assert {("raycluster.yaml", "RayCluster"), ("rayjob-stage2.yaml", "RayJob")} <= kinds


@pytest.mark.parametrize(("path", "manifest"), RAY, ids=IDS)
def test_every_field_is_one_that_kuberay_knows(
    path: Path, manifest: dict[str, Any], schemas: dict[str, dict[str, Any]]
) -> None:
    assert errors(manifest, schemas[manifest["kind"]]) == []


def plant(manifest: dict[str, Any], steps: list[str | int], old: str | None, new: str, value: Any) -> dict[str, Any]:
    """A copy of ``manifest``: below ``steps``, ``old`` renamed to ``new``, or ``new`` set to ``value``."""
    result = copy.deepcopy(manifest)
    node: Any = result
    for step in steps:
        node = node[step]
    node[new] = node.pop(old) if old else value
    return result


HEAD = ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec"]


@pytest.mark.parametrize(
    ("steps", "old", "new", "value", "said"),
    [
        (["spec"], "backoffLimit", "backOffLimit", None, "backOffLimit"),
        (["spec"], None, "submissionMode", 3, "submissionMode"),
        (["spec", "rayClusterSpec", "authOptions"], None, "mode", "tokens", "authOptions.mode"),
        (["spec", "rayClusterSpec", "autoscalerOptions"], None, "version", "v3", "autoscalerOptions.version"),
        ([*HEAD, "containers", 0, "securityContext"], "runAsNonRoot", "runAsNonroot", None, "runAsNonroot"),
        ([*HEAD, "containers", 0, "resources", "limits"], None, "memory", "8 GB", "limits.memory"),
        (["metadata"], "name", "nam", None, "metadata"),
        ([*HEAD, "volumes", 0], None, "name", "tmp", "given twice"),
    ],
)
def test_a_planted_mistake_is_caught(
    schemas: dict[str, dict[str, Any]],
    steps: list[str | int],
    old: str | None,
    new: str,
    value: Any,
    said: str,
) -> None:
    (job,) = load_manifests(KUBERAY / "rayjob-stage2.yaml")
    found = errors(plant(job, steps, old, new, value), schemas["RayJob"])
    assert found, "the validator let a mistake pass"
    assert said in " ".join(found)


def test_a_key_given_twice_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("spec:\n  backoffLimit: 1\n  backoffLimit: 2\n")
    with pytest.raises(yaml.constructor.ConstructorError, match="backoffLimit"):
        load_manifests(file)


def test_pods_of_other_kinds_fit_the_same_pod_schema(schemas: dict[str, dict[str, Any]]) -> None:
    """A Deployment's pod is a Kubernetes pod like KubeRay's: the head's template is its schema."""
    spec = schemas["RayCluster"]["properties"]["spec"]["properties"]
    schema = {"type": "object", "properties": {"template": spec["headGroupSpec"]["properties"]["template"]}}
    deployments = [manifest for _, manifest in MANIFESTS if manifest["kind"] == "Deployment"]
    assert deployments
    for deployment in deployments:
        pod = {"metadata": {"name": "any"}, "template": deployment["spec"]["template"]}
        assert errors(pod, schema) == []


@pytest.mark.parametrize(("path", "manifest"), RAY, ids=IDS)
def test_what_the_operator_refuses_is_not_asked_for(path: Path, manifest: dict[str, Any]) -> None:
    """KubeRay's own checks, which no schema holds."""
    name = manifest["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), "a DNS-1035 label"
    assert len(name) <= 47, "names of pods and services are built from it"
    cluster = cluster_spec(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        # The autoscaler v2 and SidecarMode both ask for it.
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        taken = set(group["rayStartParams"]) & {"num-cpus", "num-gpus", "memory", "resources", "labels"}
        assert not (taken and group.get("resources"))
        assert "labels" not in group["rayStartParams"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert not group.get("suspend")
    assert cluster["authOptions"]["mode"] == "token"
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    if manifest["kind"] == "RayJob":
        spec = manifest["spec"]
        assert spec["submissionMode"] == "SidecarMode"
        assert not {"clusterSelector", "submitterPodTemplate", "submitterConfig"} & set(spec)
        assert spec["backoffLimit"] >= 1
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] >= 0
        yaml.safe_load(spec["runtimeEnvYAML"])


@pytest.mark.parametrize(("path", "manifest"), RAY, ids=IDS)
def test_the_ray_of_the_manifests_is_the_ray_of_the_image(path: Path, manifest: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert cluster_spec(manifest)["rayVersion"] == pinned.group(1)


@pytest.mark.parametrize(("path", "manifest"), [entry for entry in RAY if entry[1]["kind"] == "RayJob"])
def test_entry_points_name_jobs_and_recipes_that_exist(path: Path, manifest: dict[str, Any]) -> None:
    program, script, *arguments = manifest["spec"]["entrypoint"].split()
    assert program == "python"
    named = [script, *(argument for argument in arguments if argument.endswith(".yaml"))]
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing, f"{path.name} starts {missing}, which are not in the repository"


def test_there_is_always_room_for_a_driver_on_the_head() -> None:
    for _, manifest in RAY:
        cpus = int(cluster_spec(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"])
        assert cpus >= manifest["spec"].get("entrypointNumCpus", 1)
