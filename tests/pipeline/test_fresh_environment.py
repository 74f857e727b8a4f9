"""A registered model restores in an environment that has never heard of this repository."""

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from iqpir.pixels import decode, encode_jpeg, encode_png
from iqpir.restorer import Restorer
from pipeline.register import RegisterConfig, register
from tests.conftest import draw_picture
from tests.pipeline.tiny_checkpoint import write_checkpoint

WANTED = ("torch", "numpy", "pillow", "safetensors", "mlflow")
ABSENT = ("ray", "pyiqa", "torchvision", "cv2", "webdataset", "s3fs", "iqpir", "pipeline", "jobs")
CONSUMER = """
import importlib.util, json, pathlib, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
folder = pathlib.Path(sys.argv[2])
pictures = [path.read_bytes() for path in sorted(folder.glob("input.*"))]
answer = model.predict(pandas.DataFrame({"image": pictures}), params={"quality": 0.8})
for number, picture in enumerate(answer["image"]):
    (folder / f"output{number}.png").write_bytes(picture)
found = [name for name in json.loads(sys.argv[3]) if importlib.util.find_spec(name)]
print(json.dumps({"found": found, "errors": list(answer["error"]), "path": sys.path}))
"""


def distributions(wanted: tuple[str, ...]) -> set[str]:
    """Names of ``wanted`` and of everything installed that they require."""
    seen: set[str] = set()
    open_names = list(wanted)
    while open_names:
        name = canonicalize_name(open_names.pop())
        if name in seen:
            continue
        seen.add(name)
        for text in importlib.metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(requirement.name)
    return seen


def build_environment(folder: Path, names: set[str]) -> Path:
    """A virtual environment with these distributions alone, as links to the installed files; its python."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    owners: dict[str, set[str]] = defaultdict(set)
    files: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.name)
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__"):
                owners[top].add(name)
                if name in names:
                    files[top].append((Path(file), Path(str(file.locate()))))
    for top, pairs in files.items():
        if owners[top] <= names:
            relative, source = pairs[0]
            (site / top).symlink_to(source.parents[len(relative.parts) - 2] if len(relative.parts) > 1 else source)
            continue
        # A namespace that others share: only what is ours of it.
        for relative, source in pairs:
            (site / relative).parent.mkdir(parents=True, exist_ok=True)
            (site / relative).symlink_to(source)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_a_registered_model_restores_where_only_its_requirements_are(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    version = register(RegisterConfig(checkpoint=str(checkpoint), name="fresh", tracking_uri=tracking))
    assert version.model_uri == "models:/fresh/1"
    python = build_environment(tmp_path / "environment", distributions(WANTED))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    inputs = {"input.jpg": encode_jpeg(draw_picture(1, 48)), "input.png": encode_png(draw_picture(2, 32))}
    for name, data in inputs.items():
        (folder / name).write_bytes(data)
    done = subprocess.run(
        [str(python), "-I", "-c", CONSUMER, version.model_uri, str(folder), json.dumps(ABSENT)],
        cwd=folder,
        env={
            "PATH": os.defpath,
            "HOME": str(folder),
            "MLFLOW_TRACKING_URI": tracking,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["errors"] == [None, None] and report["found"] == []
    repository = Path(__file__).parents[2]
    assert not [path for path in report["path"] if Path(path) == repository or Path(path).is_relative_to(sys.prefix)]
    restorer = Restorer.load(checkpoint)
    for number, data in enumerate(inputs.values()):
        theirs = decode((folder / f"output{number}.png").read_bytes()).array.astype(int)
        ours = decode(restorer.restore(data, quality=0.8)).array.astype(int)
        assert theirs.shape == ours.shape and np.abs(theirs - ours).max() <= 1
        assert not np.array_equal(theirs, decode(data).array)
