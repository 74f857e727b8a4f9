"""Fetch the weights of a registered model without running anything that lies in the registry.

``mlflow.pyfunc.load_model`` runs the code of the model's folder, which is right for consumers without this
repository. Here that code is not needed: weights and configuration are data, proven by the version's tags.
"""

import json
import re
import tempfile
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from iqpir.errors import UsageError, VerificationError
from iqpir.training.checkpoint import file_sha256
from pipeline.register import MODEL_DIGEST
from pipeline.registry.package import RECORD


def fetch_registered(model_uri: str, tracking_uri: str, into: Path | None = None) -> Path:
    """A verified model folder (config.json, model.safetensors) for ``Restorer.load``.

    Args:
        model_uri: ``models:/name/version`` or ``models:/name@alias``.
        tracking_uri: where it is registered.
        into: an empty folder; a temporary one by default.

    Raises:
        UsageError: there is no such version, or it is not one of ours.
        VerificationError: a file differs from what was registered.
    """
    version = resolve(model_uri, tracking_uri)
    expected = version.tags.get(MODEL_DIGEST)
    if expected is None:
        raise UsageError(f"{model_uri} was not registered by jobs/register.py.", "Register its checkpoint.")
    into = into or Path(tempfile.mkdtemp(prefix="iqpir-registered-"))
    # By its own address: a models:/ URI would be looked up at the process-wide registry.
    location = MlflowClient(tracking_uri=tracking_uri).get_model_version_download_uri(version.name, version.version)
    folder = Path(
        mlflow.artifacts.download_artifacts(
            artifact_uri=f"{location}/artifacts/model", dst_path=str(into), tracking_uri=tracking_uri
        )
    )
    if not (folder / RECORD).is_file() or file_sha256(folder / RECORD) != expected:
        raise VerificationError(f"{RECORD} of {model_uri} is not the one that was registered.")
    for name, digest in json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise VerificationError(f"{name} of {model_uri} is not the file that was registered.")
    return folder


def resolve(model_uri: str, tracking_uri: str) -> ModelVersion:
    """The version a URI means now; pin its number before long work, aliases move.

    Raises:
        UsageError: no such version.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", model_uri)
    if match is None:
        raise UsageError(f"{model_uri} names no version.", "Use models:/NAME/VERSION or models:/NAME@ALIAS.")
    client = MlflowClient(tracking_uri=tracking_uri)
    name, number, alias = match.groups()
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as error:
        raise UsageError(f"There is no model {model_uri}: {error.message}", "See the registry in MLflow.") from error
