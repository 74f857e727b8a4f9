"""The folder of a run, as later jobs read it: which run a checkpoint is of, and what MLflow knows it as."""

import json

from pipeline.storage import Storage
from pipeline.training.config import RESULT


def run_of(checkpoint_url: str) -> str:
    """Folder of the run that a checkpoint location belongs to."""
    run, separator, _ = checkpoint_url.rstrip("/").rpartition("/checkpoints/")
    return run if separator else checkpoint_url.rstrip("/")


def mlflow_run_of(checkpoint_url: str) -> str:
    """Id of the MLflow run that the training logged to; "" where the location is no folder of a run that ended."""
    storage = Storage.open(run_of(checkpoint_url))
    return str(json.loads(storage.read(RESULT)).get("mlflow_run", "")) if storage.exists(RESULT) else ""
