"""Put a checkpoint into the MLflow model registry as a model that runs without this repository.

One version per checkpoint and code, however often the job runs. The alias ``candidate`` moves only after the
version has proven itself in a clean process.
"""

import json
import logging
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _use_tracking_uri

from iqpir.config import digest
from iqpir.errors import UsageError, VerificationError
from iqpir.training.checkpoint import file_sha256
from pipeline.registry.gate import evaluation_tags
from pipeline.registry.official import OfficialConfig, official_checkpoint
from pipeline.registry.package import CONFIG, MODEL_FILE, Package, build_package, save
from pipeline.registry.self_check import check_version
from pipeline.tracking.runs import (
    RunHandle,
    end_run,
    find_run,
    open_run,
    reachable,
    tracking_location,
    wait_at_most,
)
from pipeline.training.checkpoints import fetch_checkpoint
from pipeline.training.run_folder import mlflow_run_of

log = logging.getLogger(__name__)

CANDIDATE = "candidate"
IDENTITY, SELF_CHECK, MODEL_DIGEST = "identity", "self_check", "model_digest"
TRAINING_RUN = "training_run"
"""Tag of a version: id of the MLflow run whose training made the weights."""


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Which checkpoint becomes a version of which model."""

    checkpoint: str = ""
    """Folder or URL of a checkpoint, or a run's folder (its newest checkpoint)."""
    official: OfficialConfig = field(default_factory=OfficialConfig)
    """In place of ``checkpoint``: a published CodeFormer or IQPIR file."""
    name: str = "iqpir"
    """Name of the registered model."""
    tracking_uri: str = ""
    """MLflow server or database; $MLFLOW_TRACKING_URI or the workspace's mlflow.db by default."""
    experiment: str = "iqpir"
    """MLflow experiment of the training's run, or of a new one."""
    run: str = ""
    """MLflow run (id or run_key) of the training; by default the one that the checkpoint's folder names, where the
    server has it, else a new one."""
    evaluation: str = ""
    """File or URL of this checkpoint's evaluation.json (jobs/evaluate.py); promotion needs it."""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/:.%\"'"):
            raise UsageError(f"{self.name!r} is no name for a registered model.", "Use letters, digits, - and _.")
        if bool(self.checkpoint) == bool(self.official.file):
            raise UsageError("Either a checkpoint or an official file is registered.", "Give one of the two.")


@dataclass(frozen=True)
class RegisterResult:
    """The version, and whether this run of the job made it."""

    name: str
    version: str
    model_uri: str
    alias: str
    package: str
    checkpoint_digest: str
    created: bool
    max_difference: int
    tracking_uri: str
    seconds: float


def register(config: RegisterConfig) -> RegisterResult:
    """Register a checkpoint, check the version in a clean process, and make it the candidate.

    Raises:
        UsageError: there is no such checkpoint, run, evaluation or server.
        VerificationError: the checkpoint is damaged, the evaluation is of another, or the self-check failed.
    """
    if not config.official.file:
        return _register(config)
    with tempfile.TemporaryDirectory(prefix="iqpir-official-") as folder:
        checkpoint = official_checkpoint(config.official, Path(folder))
        return _register(replace(config, checkpoint=str(checkpoint), official=OfficialConfig()))


def _register(config: RegisterConfig) -> RegisterResult:
    started = time.monotonic()
    checkpoint = fetch_checkpoint(config.checkpoint)
    metadata: dict[str, Any] = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))["metadata"]
    evaluation = evaluation_tags(config.evaluation, metadata) if config.evaluation else {}
    uri = tracking_location(config.tracking_uri)
    wait_at_most(600, 2)
    reachable(uri)
    client = MlflowClient(tracking_uri=uri)
    with tempfile.TemporaryDirectory(prefix="iqpir-register-") as folder:
        package = build_package(checkpoint, Path(folder))
        identity = _identity(package)
        version = find_version(client, config.name, identity)
        created = version is None
        if version is None:
            version = _create_version(client, config, package, identity, metadata, uri)
    model_uri = f"models:/{config.name}/{version.version}"
    for key, value in evaluation.items():
        client.set_model_version_tag(config.name, version.version, key, value)
    difference = _checked(client, version, uri, package, checkpoint)
    client.set_registered_model_alias(config.name, CANDIDATE, version.version)
    return RegisterResult(
        name=config.name,
        version=str(version.version),
        model_uri=model_uri,
        alias=CANDIDATE,
        package=package.name,
        checkpoint_digest=package.checkpoint_digest,
        created=created,
        max_difference=difference,
        tracking_uri=uri,
        seconds=time.monotonic() - started,
    )


def find_version(client: MlflowClient, name: str, identity: str) -> ModelVersion | None:
    """The oldest version of the model ``name`` with that identity, or None."""
    token = None
    hits: list[ModelVersion] = []
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        hits += [version for version in page if version.tags.get(IDENTITY) == identity]
        token = page.token
        if not token:
            return min(hits, key=lambda version: int(version.version), default=None)


def _identity(package: Package) -> str:
    """Equal for equal weights, configuration and code."""
    return digest([package.checkpoint_digest, package.name, file_sha256(MODEL_FILE)], 16)


def _create_version(
    client: MlflowClient,
    config: RegisterConfig,
    package: Package,
    identity: str,
    metadata: Mapping[str, Any],
    uri: str,
) -> ModelVersion:
    """Log the model and create the version; every tag that identifies it is there from its first moment."""
    tags = {
        IDENTITY: identity,
        "package": package.name,
        "checkpoint_digest": package.checkpoint_digest,
        MODEL_DIGEST: package.model_digest,
        **{key: str(metadata[key]) for key in _FACTS if key in metadata},
        **_training_run(config),
        **{f"lineage.{key}": str(value) for key, value in metadata.get("lineage", {}).items()},
        **git_commit(),
    }
    run = _run(config, uri, identity)
    model = _logged_model(client, run, package, identity, tags, int(metadata.get("step", 0)))
    try:
        client.create_registered_model(config.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # MLflow's database registry looks up the model at the process-wide URI, not at its client's.
    with _use_tracking_uri(uri):
        # A reply that was lost, or another process, may have made it since we looked.
        return find_version(client, config.name, identity) or client.create_model_version(
            config.name, f"models:/{model.model_id}", run.run_id, tags, model_id=model.model_id
        )


_FACTS = ("stage", "step", "samples_seen", "weights_digest", "stage1_digest")


def _training_run(config: RegisterConfig) -> dict[str, str]:
    """The tag that says which MLflow run trained the checkpoint, wherever that run is."""
    run = mlflow_run_of(config.checkpoint)
    return {TRAINING_RUN: run} if run else {}


def _run(config: RegisterConfig, uri: str, identity: str) -> RunHandle:
    """The training's run, or one of this registration's own, already finished."""
    if config.run:
        return find_run(uri, config.experiment, config.run)
    trained = mlflow_run_of(config.checkpoint)
    if trained:
        try:
            return find_run(uri, config.experiment, trained)
        except UsageError as error:
            log.warning("the version gets a run of its own, for the training's is not on this server: %s", error)
    run = open_run(uri, config.experiment, f"register@{identity}", f"register {config.name}", {}, {})
    end_run(run, "FINISHED")
    return run


def _logged_model(
    client: MlflowClient, run: RunHandle, package: Package, identity: str, tags: Mapping[str, str], step: int
) -> LoggedModel:
    """Upload the model, or find it where an earlier start was cut off between upload and version."""
    ready = client.search_logged_models([run.experiment_id], f"tags.{IDENTITY} = '{identity}'")
    for found in ready:
        if found.status == "READY":
            return found
    model = client.create_logged_model(
        run.experiment_id, "iqpir", run.run_id, dict(tags), model_type="image-restoration"
    )
    with tempfile.TemporaryDirectory(prefix="iqpir-model-") as folder:
        target = Path(folder) / "model"
        save(package, target, run.run_id, model.model_id, model.artifact_location)
        client.log_model_artifacts(model.model_id, str(target))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step=step)])
    return model


def _checked(client: MlflowClient, version: ModelVersion, uri: str, package: Package, checkpoint: Path) -> int:
    """Self-check of a version; what passed before need not again. The outcome becomes a tag."""
    name, number = version.name, version.version
    passed = version.tags.get(SELF_CHECK, "").removeprefix("passed ")
    if passed.isdigit():
        return int(passed)
    try:
        difference = check_version(f"models:/{name}/{number}", uri, package.name, checkpoint)
    except VerificationError as error:
        client.set_model_version_tag(name, number, SELF_CHECK, f"failed: {error}"[:5000])
        raise
    client.set_model_version_tag(name, number, SELF_CHECK, f"passed {difference}")
    return difference


def git_commit() -> dict[str, str]:
    """The commit of this repository, if it is one (a submitted job's working directory is not)."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return {}
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": f"{head}+changes" if changes else head}
