"""The manifests are what KubeRay accepts, to the letter, and what the operator checks beyond the schema."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from iqpir.errors import UsageError
from tests.infra.strict_schema import ROOT, crd_folder, errors, load_manifests, load_schema
from tests.jobs.scripts import job

KUBERAY = ROOT / "infra" / "kuberay"
FILES = sorted(KUBERAY.glob("*.yaml"))
MANIFESTS = [(path, manifest) for path in FILES for manifest in load_manifests(path)]
RAY = [(path, manifest) for path, manifest in MANIFESTS if manifest["apiVersion"] == "ray.io/v1"]
IDS = [f"{path.name}:{manifest['kind']}" for path, manifest in RAY]
JOBS = [(path, manifest) for path, manifest in RAY if manifest["kind"] == "RayJob"]
JOB_IDS = [path.name for path, _ in JOBS]


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


def entry_point(manifest: dict[str, Any]) -> tuple[str, list[str]]:
    """Name and arguments of the job that a RayJob starts."""
    program, script, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert program == "python"
    assert Path(script).parent == Path("jobs")
    return Path(script).stem, arguments


def read_entry_point(manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that the job makes of its entry point, where the image starts it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("IQPIR_WORKSPACE", "s3://bucket-for-corpora")
    name, arguments = entry_point(manifest)
    return job(name).parse(*arguments)


@pytest.mark.parametrize(("path", "manifest"), JOBS, ids=JOB_IDS)
def test_each_entry_point_is_understood_by_its_job(
    path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_entry_point(manifest, monkeypatch)
    assert config.corpus.startswith("s3://bucket-for-corpora/"), "what a pod writes elsewhere is gone with it"


def test_an_entry_point_with_an_unknown_flag_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = copy.deepcopy(JOBS[0][1])
    manifest["spec"]["entrypoint"] += " --num_workers 3"
    with pytest.raises(UsageError, match="num_workers"):
        read_entry_point(manifest, monkeypatch)


def resources(group: dict[str, Any]) -> dict[str, float]:
    """What one pod of a group gives Ray."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return {"cpus": float(limits["cpu"]), "gpus": float(limits.get("nvidia.com/gpu", 0))}


def test_the_training_job_has_a_node_for_each_worker_of_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    (manifest,) = [manifest for path, manifest in JOBS if path.name == "rayjob-stage2.yaml"]
    workers = read_entry_point(manifest, monkeypatch).workers
    (group,) = cluster_spec(manifest)["workerGroupSpecs"]
    assert group["replicas"] == workers.count <= group["maxReplicas"]
    assert workers.gpus == "yes" and resources(group)["gpus"] == 1
    assert workers.cpus <= resources(group)["cpus"]


def test_the_scoring_job_asks_for_what_its_nodes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    (manifest,) = [manifest for path, manifest in JOBS if path.name == "rayjob-score.yaml"]
    config = read_entry_point(manifest, monkeypatch)
    (group,) = cluster_spec(manifest)["workerGroupSpecs"]
    assert config.device == "cpu" and config.scheduling.gpus == 0
    wanted = config.scheduling.workers * config.scheduling.cpus
    assert wanted == group["maxReplicas"] * resources(group)["cpus"], "grows to all its nodes, and no further"


@pytest.mark.parametrize(("path", "manifest"), RAY, ids=IDS)
def test_every_pod_of_ray_has_the_workspace_of_the_recipes(path: Path, manifest: dict[str, Any]) -> None:
    cluster = cluster_spec(manifest)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        (entry,) = [entry for entry in container["env"] if entry["name"] == "IQPIR_WORKSPACE"]
        assert entry["valueFrom"] == {"secretKeyRef": {"name": "iqpir-storage", "key": "IQPIR_WORKSPACE"}}
    assert "--from-literal=IQPIR_WORKSPACE=s3://" in (ROOT / "infra/README.md").read_text()


def test_there_is_always_room_for_a_driver_on_the_head() -> None:
    for _, manifest in RAY:
        cpus = int(cluster_spec(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"])
        assert cpus >= manifest["spec"].get("entrypointNumCpus", 1)
