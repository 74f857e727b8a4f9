"""The registered model itself (MLflow models-from-code): this file is copied beside the weights and run.

It imports nothing of this repository: the inference code lies in the model's own ``code`` folder under the
name that ``package.json`` gives.
"""

import hashlib
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

COLUMN = "image"
QUALITY, FIDELITY = 0.95, 0.0
_ROW_ERRORS = (ValueError, RuntimeError, MemoryError, OSError)


class RestorationModel(PythonModel):
    """Restores pictures: encoded bytes in, PNG bytes out, one error text per row that failed."""

    def load_context(self, context: PythonModelContext) -> None:
        """Check the files against ``package.json`` and load the network, on a GPU where there is one.

        Raises:
            MlflowException: a file is not the registered one.
        """
        folder = Path(context.artifacts["model"])
        record = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        for name, expected in record["files"].items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise MlflowException(f"{name} is not the file that was registered: its sha256 differs.")
        restorer = importlib.import_module(f"{record['package']}.restorer")
        self._refusal = importlib.import_module(f"{record['package']}.errors").IqpirError
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._restorer = restorer.Restorer.load(folder, device=device)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Restore every picture in the column ``image`` (PNG, JPEG, WebP ... bytes).

        Args:
            context: not used; everything is loaded.
            model_input: the pictures; also a dict of lists, a list of rows, or a list of pictures.
            params: ``quality`` wanted, in [0,1] (0.95); ``fidelity`` in [0,1] (0: best quality; more needs a model
                of stage 3).

        Returns:
            per row, in order: ``image`` (PNG bytes or None) and ``error`` (None, or why there is no picture).
            A row that fails never gives its input back, and never fails another row.

        Raises:
            MlflowException: there is no column ``image``, a param is out of range, or fidelity was not learnt.
        """
        params = params or {}
        quality = _unit("quality", params.get("quality", QUALITY))
        fidelity = _unit("fidelity", params.get("fidelity", FIDELITY))
        if fidelity > 0 and not self._restorer.takes_fidelity:
            raise MlflowException.invalid_parameter_value(
                f"fidelity {fidelity} needs a model of stage 3; this one takes 0 only."
            )
        rows = [self._restore(data, quality, fidelity) for data in _pictures(model_input)]
        return pd.DataFrame(
            {
                "image": pd.Series([picture for picture, _ in rows], dtype=object),
                "error": pd.Series([error for _, error in rows], dtype=object),
            }
        )

    def _restore(self, data: object, quality: float, fidelity: float) -> tuple[bytes | None, str | None]:
        if not isinstance(data, bytes | bytearray | memoryview):
            return None, f"not_an_image: the row holds {type(data).__name__}, not the bytes of a picture."
        try:
            return bytes(self._restorer.restore(bytes(data), quality=quality, fidelity=fidelity)), None
        except (self._refusal, *_ROW_ERRORS) as error:
            return None, str(error) or type(error).__name__


def _unit(name: str, value: object) -> float:
    """``value`` as a number in [0,1].

    Raises:
        MlflowException: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MlflowException.invalid_parameter_value(f"{name} {value!r} is no number.")
    if not 0.0 <= value <= 1.0:
        raise MlflowException.invalid_parameter_value(f"{name} {value} is outside [0, 1].")
    return float(value)


def _pictures(model_input: Any) -> list[object]:
    """The entries of the column ``image``, in order."""
    if isinstance(model_input, list) and all(isinstance(row, Mapping) for row in model_input):
        model_input = pd.DataFrame(model_input, columns=[COLUMN])
    if isinstance(model_input, list):
        return model_input
    if COLUMN not in model_input:
        raise MlflowException.invalid_parameter_value(f"The input has no column {COLUMN!r}.")
    column = model_input[COLUMN]
    return [column] if isinstance(column, bytes) else list(column)


set_model(RestorationModel())
