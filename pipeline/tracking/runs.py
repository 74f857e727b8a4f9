"""Experiment tracking in MLflow: one run per ``run_key`` for life, written to by explicit run id only.

The fluent API is never used: its active run is bound to a thread, and every retry would open a second run.
A server that is away when a job starts is a usage error within seconds; later it costs the job nothing
(``RunLog``).
"""

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from iqpir.errors import UsageError
from pipeline.command import workspace
from pipeline.tracking.courier import UNAVAILABLE, RunHandle
from pipeline.tracking.run_log import RunLog, end_run

__all__ = [
    "AwayError",
    "RunHandle",
    "RunLog",
    "end_run",
    "find_run",
    "log_dataset",
    "open_run",
    "reachable",
    "shown",
    "tracking_location",
    "wait_at_most",
]

RUN_KEY = "run_key"
"""Tag that identifies a run over retries, resizes and resubmissions."""


class AwayError(UsageError):
    """The tracking server does not answer, or refuses."""


_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_MAX_PARAM, _MAX_TAG, _BATCH = 6000, 5000, 100


def tracking_location(uri: str = "", folder: str | Path | None = None) -> str:
    """The tracking URI that is meant: ``uri``, ``$MLFLOW_TRACKING_URI``, or ``mlflow.db`` in ``folder``.

    Args:
        uri: server or database; a relative SQLite path becomes absolute, since workers run elsewhere.
        folder: the workspace by default.

    Raises:
        UsageError: a folder or file URL (MLflow keeps no runs in files any more), or a remote workspace.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        folder = str(folder or workspace())
        if "://" in folder:
            raise UsageError(f"An SQLite database cannot lie in {folder}.", "Set MLFLOW_TRACKING_URI.")
        return f"sqlite:///{Path(folder).expanduser().resolve() / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{_sqlite_path(uri).expanduser().resolve()}"
    if urlsplit(uri).scheme in ("", "file") and uri != "databricks":
        raise UsageError(
            f"{uri} is no MLflow server or database.", f"Use http://HOST:PORT, or sqlite:///{uri}/mlflow.db."
        )
    return uri


def wait_at_most(seconds: int, retries: int) -> None:
    """Bound every request of MLflow's client in this process; values in the environment win."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(seconds))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))


def reachable(tracking_uri: str) -> None:
    """Prove within seconds that the tracking server answers and lets us in.

    Raises:
        AwayError: it does not.
    """
    wait_at_most(10, 2)
    parts = urlsplit(tracking_uri)
    remedy = "Start it, or point --tracking_uri or MLFLOW_TRACKING_URI to one that runs."
    try:
        if parts.scheme in ("http", "https"):
            insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true")
            verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not insecure
            answer = requests.get(f"{tracking_uri.rstrip('/')}/health", timeout=5, verify=verify)
            if answer.status_code >= 500:
                raise AwayError(f"MLflow at {shown(tracking_uri)} answers {answer.status_code}.", remedy)
        elif parts.hostname:
            port = parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0], 0)
            socket.create_connection((parts.hostname, port), timeout=5).close()
        elif parts.scheme == "sqlite":
            _sqlite_path(tracking_uri).parent.mkdir(parents=True, exist_ok=True)
        MlflowClient(tracking_uri=tracking_uri).search_experiments(max_results=1)
    except UNAVAILABLE as error:
        raise AwayError(f"MLflow at {shown(tracking_uri)} cannot be used: {_first_line(error)}", remedy) from error


def open_run(
    tracking_uri: str,
    experiment: str,
    run_key: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> RunHandle:
    """The run with ``run_key``, created if there is none, with status RUNNING.

    Params are written once: MLflow cannot change them, so a param that differs from the recorded one becomes
    the tag ``drift.<param>``. Tags are overwritten.

    Args:
        tracking_uri: from ``tracking_location``.
        experiment: name; created if absent.
        run_key: what makes it the same run; any text.
        name: for people.
        params: nested mappings become dotted names.
        tags: text to text.

    Raises:
        AwayError: the server is away or refuses.
        UsageError: two runs have that key, or the experiment was deleted.
    """
    reachable(tracking_uri)
    client = MlflowClient(tracking_uri=tracking_uri)
    try:
        experiment_id = _experiment(client, tracking_uri, experiment)
        run = _run_with_key(client, experiment_id, run_key)
        if run is None:
            run = _create_run(client, experiment_id, run_key, name)
        client.update_run(run.info.run_id, status="RUNNING")
        _describe(client, run, _flat(params), {str(key): str(value) for key, value in tags.items()})
    except UNAVAILABLE as error:
        raise AwayError(f"MLflow at {shown(tracking_uri)} refuses: {_first_line(error)}") from error
    return RunHandle(run.info.run_id, experiment_id, tracking_uri)


def find_run(tracking_uri: str, experiment: str, run: str) -> RunHandle:
    """A run that exists, by its id or its ``run_key``.

    Raises:
        UsageError: there is none, or several have that key.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    if re.fullmatch(r"[0-9a-f]{32}", run):
        try:
            info = client.get_run(run).info
        except MlflowException as error:
            raise UsageError(f"MLflow has no run {run}: {_first_line(error)}") from error
        return RunHandle(run, info.experiment_id, tracking_uri)
    found = client.get_experiment_by_name(experiment)
    hit = None if found is None else _run_with_key(client, found.experiment_id, run)
    if hit is None:
        raise UsageError(f"Experiment {experiment} has no run with the key {run!r}.", "Give a run's id or run_key.")
    return RunHandle(hit.info.run_id, hit.info.experiment_id, tracking_uri)


def log_dataset(handle: RunHandle, name: str, digest: str, source: str, context: str = "training") -> None:
    """Record what data a run used; the same record again changes nothing.

    Args:
        handle: the run.
        name: for people, such as ``hq@v0001``.
        digest: of the content, at most 36 characters.
        source: folder or URL.
        context: ``training`` or ``evaluation``.

    Raises:
        AwayError: the server does not take it.
    """
    url = source if "://" in source else Path(source).resolve().as_uri()
    scheme = urlsplit(url).scheme
    kind = "local" if scheme == "file" else scheme
    dataset = Dataset(name, digest[:36], source_type=kind, source=json.dumps({"uri": url}))
    entry = DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", context)])
    try:
        MlflowClient(tracking_uri=handle.tracking_uri).log_inputs(handle.run_id, datasets=[entry])
    except UNAVAILABLE as error:
        raise AwayError(
            f"MLflow at {shown(handle.tracking_uri)} does not take the dataset {name}: {_first_line(error)}"
        ) from error


def _experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """Id of the experiment; artifacts of a SQLite one lie beside the database, not in the current folder."""
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if tracking_uri.startswith("sqlite:///"):
            location = (_sqlite_path(tracking_uri).parent / "mlartifacts" / quote(name, safe="")).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise UsageError(f"The MLflow experiment {name} was deleted.", "Restore it, or choose another --experiment.")
    return str(found.experiment_id)


def _run_with_key(client: MlflowClient, experiment_id: str, run_key: str) -> Run | None:
    """The one run with that key, or None."""
    hits = _runs_with_key(client, experiment_id, run_key)
    if len(hits) > 1:
        raise UsageError(
            f"{len(hits)} runs have the key {run_key!r}: {', '.join(run.info.run_id for run in hits)}.",
            "Delete all but one of them in MLflow.",
        )
    return hits[0] if hits else None


def _runs_with_key(client: MlflowClient, experiment_id: str, run_key: str) -> list[Run]:
    """Oldest first. MLflow's filters know no escapes: search by the harmless beginning, compare here."""
    beginning = re.match(r"[A-Za-z0-9@._:/ -]*", run_key)
    prefix = beginning[0] if beginning else ""
    text = f"tags.{RUN_KEY} = '{run_key}'" if prefix == run_key else f"tags.{RUN_KEY} LIKE '{prefix}%'"
    hits: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], text, max_results=1000, page_token=token)
        hits += [run for run in page if run.data.tags.get(RUN_KEY) == run_key]
        token = page.token
        if not token:
            return sorted(hits, key=lambda run: (run.info.start_time, run.info.run_id))


def _create_run(client: MlflowClient, experiment_id: str, run_key: str, name: str) -> Run:
    """A new run, unless another process has just made one: then that, and ours goes."""
    ours: Run = client.create_run(experiment_id, run_name=name, tags={RUN_KEY: run_key})
    first = _runs_with_key(client, experiment_id, run_key)[0]
    if first.info.run_id != ours.info.run_id:
        client.delete_run(ours.info.run_id)
    return first


def _describe(client: MlflowClient, run: Run, params: dict[str, str], tags: dict[str, str]) -> None:
    recorded = run.data.params
    new = {key: value for key, value in params.items() if key not in recorded}
    for key, value in params.items():
        if key in recorded and recorded[key] != value:
            tags[f"drift.{key}"] = f"{recorded[key]} -> {value}"
    run_tags = [RunTag(key, value[:_MAX_TAG]) for key, value in tags.items()]
    run_params = [Param(key, value) for key, value in new.items()]
    for start in range(0, max(len(run_tags), len(run_params)), _BATCH):
        part = slice(start, start + _BATCH)
        client.log_batch(run.info.run_id, params=run_params[part], tags=run_tags[part])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = str(value)
            flat[f"{prefix}{key}"] = text if len(text) <= _MAX_PARAM else f"{text[: _MAX_PARAM - 3]}..."
    return flat


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


def shown(uri: str) -> str:
    """The URI without a password."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."
