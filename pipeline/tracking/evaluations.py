"""What an evaluation found, in MLflow: a run below the training's, and the headline figures in the training's own."""

import io
import math
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from PIL import Image

from iqpir.errors import UsageError
from pipeline.tracking.courier import UNAVAILABLE, RunHandle
from pipeline.tracking.runs import end_run, open_run, wait_at_most

_PERCENT = 100


def log_evaluation(
    training: RunHandle,
    key: str,
    values: Mapping[str, Any],
    montage: bytes,
    params: Mapping[str, Any],
    step: int,
) -> RunHandle:
    """Log an evaluation once; the same ``key`` again changes nothing.

    Args:
        training: the run of the training that made the weights.
        key: what makes it the same evaluation of the same weights.
        values: of evaluation.json.
        montage: an encoded picture.
        params: what was asked for.
        step: of the checkpoint; the headline figures are those of the training's run at this step.

    Raises:
        UsageError: the server is away or refuses.
    """
    wait_at_most(600, 2)
    client = MlflowClient(tracking_uri=training.tracking_uri)
    try:
        experiment = client.get_experiment(training.experiment_id).name
        run_key, tags = f"evaluation@{key}", {MLFLOW_PARENT_RUN_ID: training.run_id, "stage": "evaluate"}
        run = open_run(training.tracking_uri, experiment, run_key, f"evaluate {values['digest']}", params, tags)
        if not client.get_run(run.run_id).data.tags.get("logged"):
            headline = _points(_headline(values), step)
            client.log_batch(run.run_id, metrics=headline + _curves(values))
            client.log_dict(run.run_id, dict(values), "evaluation.json")
            with Image.open(io.BytesIO(montage)) as picture:
                client.log_image(run.run_id, picture, artifact_file="montage.png")
            client.log_batch(training.run_id, metrics=headline)
            client.set_tag(run.run_id, "logged", "yes")
    except UNAVAILABLE as error:
        raise UsageError(f"MLflow does not take the evaluation: {error}", "The same command logs it again.") from error
    end_run(run, "FINISHED")
    return run


def _headline(values: Mapping[str, Any]) -> dict[str, float]:
    groups = {name: values[name] for name in ("quality", "outside", "psnr", "ssim")}
    figures = {f"evaluation/{group}/{name}": value for group, found in groups.items() for name, value in found.items()}
    figures |= {f"evaluation/{name}/restored": found["restored"] for name, found in values["metrics"].items()}
    return figures | {f"evaluation/{name}": values[name] for name in ("dial_spearman", "dial_range")}


def _curves(values: Mapping[str, Any]) -> list[Metric]:
    """Measured values along the dial; the step is the requested quality in percent."""
    settings = [setting for setting, _ in values["dial"]]
    curves = {"quality": [measured for _, measured in values["dial"]], **values["curve"]}
    curves |= {name: found["dial"] for name, found in values["metrics"].items()}
    return [
        point
        for name, curve in curves.items()
        for setting, value in zip(settings, curve, strict=True)
        for point in _points({f"dial/{name}": value}, round(_PERCENT * setting))
    ]


def _points(figures: Mapping[str, float], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(name, value, now, step) for name, value in figures.items() if math.isfinite(value)]
