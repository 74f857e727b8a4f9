"""What every pod of the manifests promises: no root, no privileges, limits, no secret in the file."""

import re
from typing import Any

import pytest

from tests.infra.strict_schema import ROOT, load_manifests

FILES = sorted((ROOT / "infra" / "kuberay").glob("*.yaml"))
MANIFESTS = [(path.name, manifest) for path in FILES for manifest in load_manifests(path)]
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


def pod_templates(node: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Every pod template below ``node``."""
    if isinstance(node, list):
        return [found for index, child in enumerate(node) for found in pod_templates(child, f"{where}[{index}]")]
    if not isinstance(node, dict):
        return []
    here = [(where, node["template"]["spec"])] if "containers" in node.get("template", {}).get("spec", {}) else []
    return here + [found for key, child in node.items() for found in pod_templates(child, f"{where}.{key}")]


PODS = [pod for name, manifest in MANIFESTS for pod in pod_templates(manifest, f"{name}:{manifest['kind']}")]
POD_IDS = [where for where, _ in PODS]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", [])]


def is_locked(context: dict[str, Any]) -> bool:
    return (
        context["runAsNonRoot"] is True
        and context["allowPrivilegeEscalation"] is False
        and context["readOnlyRootFilesystem"] is True
        and context.get("privileged", False) is False
        and context["capabilities"] == {"drop": ["ALL"]}
        and context["seccompProfile"] == {"type": "RuntimeDefault"}
    )


def test_pods_were_found() -> None:
    assert len(PODS) >= 8, POD_IDS


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=POD_IDS)
def test_no_pod_is_root_or_holds_an_api_token(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not pod.get("hostNetwork")
    assert not pod.get("hostPID")
    assert not any("hostPath" in volume for volume in pod.get("volumes", []))


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=POD_IDS)
def test_every_container_is_locked_and_bounded(pod: dict[str, Any]) -> None:
    for container in containers(pod):
        assert is_locked(container["securityContext"]), container["name"]
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(limits)
        # A pod that asks for less memory than it may use is the first to be killed.
        assert set(limits) == set(requests)
        image, _, tag = container["image"].rpartition(":")
        assert image, container["image"]
        assert tag not in {"", "latest"}


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=POD_IDS)
def test_what_is_written_goes_to_bounded_volumes(pod: dict[str, Any]) -> None:
    """The root file system is read-only: what is mounted exists, and every emptyDir has a size."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in containers(pod):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) <= set(volumes)
        assert "/tmp" in mounts
    assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume)


@pytest.mark.parametrize("manifest", [manifest for _, manifest in MANIFESTS if manifest["apiVersion"] == "ray.io/v1"])
def test_ray_has_shared_memory_and_only_the_autoscaler_an_api_token(manifest: dict[str, Any]) -> None:
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    templates = [
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
    ]
    for template in templates:
        pod = template["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "/var/run/secrets/kubernetes.io/serviceaccount" not in mounts
    autoscaler = cluster["autoscalerOptions"]
    assert is_locked(autoscaler["securityContext"])
    assert {"cpu", "memory"} == set(autoscaler["resources"]["limits"])
    head_volumes = {volume["name"] for volume in templates[0]["spec"]["volumes"]}
    assert {mount["name"] for mount in autoscaler["volumeMounts"]} <= head_volumes
    token = [mount for mount in autoscaler["volumeMounts"] if mount["mountPath"].startswith("/var/run/secrets")]
    assert [mount["readOnly"] for mount in token] == [True]


def walk(node: Any) -> list[tuple[str, Any]]:
    """Every key and value below ``node``; an environment variable counts as its own key."""
    if isinstance(node, list):
        return [entry for child in node for entry in walk(child)]
    if not isinstance(node, dict):
        return []
    own = [(node["name"], node["value"])] if {"name", "value"} <= set(node) else []
    return own + [(key, value) for key, value in node.items()] + [e for child in node.values() for e in walk(child)]


@pytest.mark.parametrize(("name", "manifest"), MANIFESTS)
def test_no_secret_is_written_in_a_manifest(name: str, manifest: dict[str, Any]) -> None:
    assert manifest["kind"] != "Secret", "a Secret is made by kubectl, from values that no file holds"
    for key, value in walk(manifest):
        if isinstance(value, str) and SECRET_NAME.search(key):
            assert key in {"secretName", "serviceAccountToken", "automountServiceAccountToken"}, f"{name}: {key}"
    # What a job's environment holds is shown to whoever sees the dashboard.
    assert not SECRET_NAME.search(manifest["spec"].get("runtimeEnvYAML", ""))


def test_the_networks_default_is_no() -> None:
    policies = [manifest["spec"] for _, manifest in MANIFESTS if manifest["kind"] == "NetworkPolicy"]
    ray = next(spec for spec in policies if "ray.io/is-ray-node" in spec["podSelector"]["matchLabels"])
    assert set(ray["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for spec in policies for rule in spec.get("ingress", [])), (
        "a rule without `from` lets all in"
    )
    outside = [peer["ipBlock"] for rule in ray["egress"] for peer in rule["to"] if "ipBlock" in peer]
    assert all("169.254.0.0/16" in block["except"] for block in outside), "the metadata service hands out credentials"


def test_policies_and_services_select_pods_that_exist() -> None:
    labels = [
        manifest["spec"]["template"]["metadata"]["labels"]
        for _, manifest in MANIFESTS
        if manifest["kind"] == "Deployment"
    ]
    for _, manifest in MANIFESTS:
        if manifest["kind"] == "Service":
            selector = manifest["spec"]["selector"]
            assert any(selector.items() <= found.items() for found in labels), selector
            assert manifest["spec"]["type"] == "ClusterIP"
