"""Load a registered model as a stranger would: no repository, no pickle, no network once the files are here.

Run by path with ``python -I`` (see ``pipeline.register``); imports only the standard library before it has
hidden this repository and the libraries a registered model may not need. Prints one JSON report.

    python -I pipeline/registry/clean_process.py MODEL_URI TRACKING_URI REQUEST_FOLDER
"""

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HIDDEN = frozenset(
    [
        "iqpir",
        "pipeline",
        "jobs",
        "infra",
        "tests",
        "ray",
        "pyiqa",
        "torchvision",
        "cv2",
        "webdataset",
        "fsspec",
        "s3fs",
    ]
)
"""Packages that shall look as if they were not installed."""


class Without:
    """A finder of ``sys.meta_path`` that does not find the hidden packages."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As the wrapped finder does, or None for what is hidden."""
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that lets no socket connect to another host."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        raise PermissionError(f"the model connects to {arguments[1]}")


def check(model_uri: str, tracking_uri: str, requests: Path) -> dict[str, Any]:
    """Download the model, then load and run it on ``requests/request.json``; answers go to ``requests``.

    Returns:
        the report: package, modules it came from, hidden packages that were loaded all the same.
    """
    mlflow = importlib.import_module("mlflow")
    pandas = importlib.import_module("pandas")
    mlflow.set_tracking_uri(tracking_uri)
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=str(requests / "model")))
    sys.addaudithook(refuse_network)
    model = mlflow.pyfunc.load_model(str(folder))
    errors: dict[str, list[str | None]] = {}
    for case in json.loads((requests / "request.json").read_text(encoding="utf-8")):
        pictures = [(requests / name).read_bytes() for name in case["pictures"]]
        answer = model.predict(pandas.DataFrame({"image": pictures}), params=case["params"])
        for name, picture in zip(case["pictures"], answer["image"], strict=True):
            if picture is not None:
                (requests / f"{case['name']}-{name}.png").write_bytes(picture)
        errors[case["name"]] = [None if error is None else str(error) for error in answer["error"]]
    return {"errors": errors, **origin(sys.modules.items(), folder / "code")}


def origin(modules: Iterable[tuple[str, Any]], code: Path) -> dict[str, Any]:
    """Where the inference code was loaded from."""
    names = {path.name for path in code.iterdir() if path.is_dir() and path.name != "__pycache__"}
    loaded = {name: str(getattr(module, "__file__", "")) for name, module in modules}
    ours = {name: file for name, file in loaded.items() if name.partition(".")[0] in names}
    return {
        "packages": sorted(names),
        "modules": sorted(ours),
        "elsewhere": sorted(n for n, file in ours.items() if not Path(file).is_relative_to(code)),
        "hidden": sorted(name for name in loaded if name.partition(".")[0] in HIDDEN),
    }


if __name__ == "__main__":
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    report = check(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.stdout.write("\n" + json.dumps(report) + "\n")
