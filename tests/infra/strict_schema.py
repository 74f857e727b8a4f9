"""Strict validation of Kubernetes manifests against the OpenAPI schemas inside custom resource definitions.

The API server drops fields that a schema does not know, so a misspelt one does nothing, silently. Here an
unknown field is an error. CEL rules (``x-kubernetes-validations``) need the API server and are not evaluated.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CRDS = ROOT.parent / "shared" / "data" / "kuberay_crds"

OBJECT_META = frozenset({"name", "namespace", "labels", "annotations", "generateName", "finalizers"})


class ManifestLoader(yaml.SafeLoader):
    """A safe loader that refuses a key that is given twice."""


def _mapping_without_duplicates(loader: ManifestLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"given twice: {sorted(twice)}", node.start_mark)
    loader.flatten_mapping(node)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


ManifestLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def load_manifests(path: Path) -> list[dict[str, Any]]:
    """Every document of a YAML file."""
    # The loader is SafeLoader with one constructor more.
    return [document for document in yaml.load_all(path.read_text(), ManifestLoader) if document]


def crd_folder() -> Path | None:
    """Where KubeRay's definitions are: ``IQPIR_KUBERAY_CRDS``, or beside this checkout; else None."""
    folder = Path(os.environ.get("IQPIR_KUBERAY_CRDS", DEFAULT_CRDS))
    return folder if any(folder.glob("*.yaml")) else None


def load_schema(folder: Path, kind: str, version: str) -> dict[str, Any]:
    """The OpenAPI schema of one version of a kind."""
    for path in sorted(folder.glob("*.yaml")):
        definition = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        if definition["spec"]["names"]["kind"] == kind:
            for candidate in definition["spec"]["versions"]:
                if candidate["name"] == version and candidate["served"]:
                    return dict(candidate["schema"]["openAPIV3Schema"])
    raise LookupError(f"no {kind} {version} in {folder}")


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema as JSON Schema in which fields that are not named are errors."""
    result = {key: value for key, value in schema.items() if key not in {"description", "default", "nullable"}}
    for combiner in ("anyOf", "oneOf", "allOf"):
        if combiner in schema:
            # Structural schemas repeat no properties below a combiner: it only narrows values.
            result[combiner] = list(schema[combiner])
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if "properties" in schema:
        result["properties"] = {name: strict(child) for name, child in schema["properties"].items()}
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        result["additionalProperties"] = strict(extra)
    elif schema.get("type") == "object" and extra is None and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
        if schema.get("x-kubernetes-embedded-resource"):
            known = {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"type": "object"},
            }
            result["properties"] = {**known, **result.get("properties", {})}
    if schema.get("nullable"):
        result = {"anyOf": [{"type": "null"}, result]}
    return result


def _unique_by_keys(
    validator: Any, keys: list[str], instance: Any, schema: dict[str, Any]
) -> Iterator[jsonschema.ValidationError]:
    """``x-kubernetes-list-map-keys``: two entries with the same keys are a conflict."""
    if schema.get("x-kubernetes-list-type") != "map" or not isinstance(instance, list):
        return
    seen = [tuple(entry.get(key) for key in keys) for entry in instance if isinstance(entry, dict)]
    for identity in sorted({entry for entry in seen if seen.count(entry) > 1}, key=str):
        yield jsonschema.ValidationError(f"{dict(zip(keys, identity, strict=True))} is given twice")


StrictValidator = jsonschema.validators.extend(
    jsonschema.Draft7Validator, {"x-kubernetes-list-map-keys": _unique_by_keys}
)


def errors(manifest: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What is wrong with ``manifest``, one line each; empty when nothing is."""
    strict_schema = strict(schema)
    # A definition leaves metadata to the API server, which knows these fields.
    strict_schema.setdefault("properties", {})["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {name: {} for name in OBJECT_META},
        "additionalProperties": False,
    }
    found = StrictValidator(strict_schema).iter_errors(manifest)
    return sorted(f"{'.'.join(str(step) for step in error.absolute_path)}: {error.message}" for error in found)
