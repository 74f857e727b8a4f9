"""A registered model carries its own code: small, renamed, and never another version's."""

import ast
import importlib
import io
import json
import shutil
import sys
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import predictions_to_json

import iqpir
from iqpir.errors import PermanentError
from iqpir.pixels import decode, encode_jpeg, encode_png
from iqpir.restorer import Restorer
from pipeline.registry import package as packaging
from pipeline.registry.package import ALLOWED, ENTRY, Package, build_package, closure, foreign_imports, renamed, save
from tests.conftest import draw_picture
from tests.pipeline.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("package") / "checkpoint", stage="stage3")


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return build_package(checkpoint, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def model(package: Package, tmp_path_factory: pytest.TempPathFactory) -> PyFuncModel:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(package, folder)
    return mlflow.pyfunc.load_model(str(folder))


def other_code(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of iqpir's sources with one change."""
    source = Path(iqpir.__file__).parent
    target = folder / "iqpir"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    text = (target / file).read_text()
    assert old in text
    (target / file).write_text(text.replace(old, new, 1))
    return target


def test_the_inference_code_imports_torch_numpy_safetensors_and_pillow_only() -> None:
    modules = closure(ENTRY)
    assert {ENTRY, "iqpir", "iqpir.errors", "iqpir.networks.restoration_network"} <= modules.keys()
    imported = {name for path in modules.values() for name in foreign_imports(path)}
    assert imported == ALLOWED
    assert not [name for name in modules if name.startswith(("iqpir.training", "iqpir.stages", "iqpir.degradation"))]


def test_vendored_code_names_its_own_package_and_is_otherwise_unchanged(package: Package) -> None:
    assert package.name.startswith("iqpir_") and len(package.name) == len("iqpir_") + 8
    files = {path.relative_to(package.code).as_posix() for path in package.code.rglob("*.py")}
    root = Path(iqpir.__file__).parent
    assert files == {path.relative_to(root).as_posix() for path in closure(ENTRY).values()}
    for file in files:
        vendored, original = (package.code / file).read_text(), (root / file).read_text()
        assert vendored.replace(package.name, "iqpir") == original.replace(package.name, "iqpir")
        for node in ast.walk(ast.parse(vendored)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "iqpir" not in {name.split(".")[0] for name in names}


def test_the_name_follows_the_contents(
    checkpoint: Path, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build_package(checkpoint, tmp_path / "again").name == package.name
    changed = other_code(tmp_path, "restorer.py", '"""', '"""Changed. ')
    monkeypatch.setattr(packaging, "_root_folder", lambda: changed)
    assert build_package(checkpoint, tmp_path / "changed").name != package.name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from iqpir.errors import UsageError\n", "from p.errors import UsageError\n"),
        ("from iqpir import build\n", "from p import build\n"),
        ("import iqpir.config as c\n", "import p.config as c\n"),
        ("import os, iqpir.config as c\n", "import os, p.config as c\n"),
        ("x = 'ü'; from iqpir.a import b  # iqpir\n", "x = 'ü'; from p.a import b  # iqpir\n"),
        (
            "def f():\n    from iqpir.a import (\n        iqpir,\n    )\n",
            "def f():\n    from p.a import (\n        iqpir,\n    )\n",
        ),
        ("iqpir = 'from iqpir.x import y'\n", "iqpir = 'from iqpir.x import y'\n"),
        ("from iqpirate import x\n", "from iqpirate import x\n"),
    ],
)
def test_only_import_lines_are_renamed(source: str, expected: str) -> None:
    assert renamed(source.encode(), "p").decode() == expected


@pytest.mark.parametrize("source", ["import iqpir.config\n", "import iqpir\n", "from .errors import UsageError\n"])
def test_imports_that_cannot_be_renamed_are_refused(source: str) -> None:
    with pytest.raises(PermanentError):
        renamed(source.encode(), "p")


def test_inference_code_that_needs_more_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = other_code(tmp_path, "tiling.py", "import torch\n", "import torch\nimport ray\n")
    monkeypatch.setattr(packaging, "_root_folder", lambda: changed)
    with pytest.raises(PermanentError, match="ray"):
        build_package(checkpoint, tmp_path / "built")


def test_the_model_answers_as_the_checkpoint_does(model: PyFuncModel, checkpoint: Path) -> None:
    restorer = Restorer.load(checkpoint)
    square, wide = draw_picture(1, 32), draw_picture(2, 48)[:40]
    inputs = [encode_png(square), encode_jpeg(wide)]
    answer = model.predict(pd.DataFrame({"image": inputs}), params={"quality": 0.3, "fidelity": 0.5})
    assert list(answer.columns) == ["image", "error"] and list(answer["error"]) == [None, None]
    for data, restored in zip(inputs, answer["image"], strict=True):
        assert restored == restorer.restore(data, quality=0.3, fidelity=0.5)
    default = model.predict(pd.DataFrame({"image": inputs[:1]}))["image"][0]
    assert default == restorer.restore(inputs[0], quality=0.95, fidelity=0.0)


def test_one_bad_row_neither_fails_the_batch_nor_gives_its_input_back(model: PyFuncModel) -> None:
    good = encode_png(draw_picture(3, 32))
    rows = [b"", good[:200], b"text", good, b"\xff\xd8\xff" + bytes(50)]
    answer = model.predict(pd.DataFrame({"image": rows}))
    assert [picture is None for picture in answer["image"]] == [True, True, True, False, True]
    assert [error is None for error in answer["error"]] == [False, False, False, True, False]
    assert [error.split(":")[0] for error in answer["error"] if error] == [
        "empty",
        "truncated",
        "not_an_image",
        "truncated",
    ]
    assert decode(answer["image"][3]).array.shape == (32, 32, 3)


def test_lists_and_dicts_are_taken_too(model: PyFuncModel) -> None:
    good = encode_png(draw_picture(4, 32))
    python_model = model.unwrap_python_model()
    expected = model.predict(pd.DataFrame({"image": [good]}))["image"][0]
    for rows in ({"image": [good]}, {"image": good}, [good], [{"image": good}]):
        assert python_model.predict(None, rows)["image"][0] == expected
    assert python_model.predict(None, [None, 5])["error"].notna().all()
    with pytest.raises(MlflowException, match="no column 'image'"):
        python_model.predict(None, {"picture": [good]})


@pytest.mark.parametrize("params", [{"quality": 1.5}, {"quality": float("nan")}, {"fidelity": -0.1}])
def test_params_out_of_range_are_an_error_for_the_caller(model: PyFuncModel, params: dict[str, float]) -> None:
    with pytest.raises(MlflowException, match=next(iter(params))):
        model.predict(pd.DataFrame({"image": [encode_png(draw_picture(5, 32))]}), params=params)


def test_fidelity_that_was_not_learnt_is_an_error_for_the_caller(tmp_path: Path) -> None:
    save(build_package(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "built"), tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    pictures = pd.DataFrame({"image": [encode_png(draw_picture(5, 32))]})
    with pytest.raises(MlflowException, match=r"fidelity 0\.5 needs a model of stage 3"):
        model.predict(pictures, params={"fidelity": 0.5})
    assert model.predict(pictures, params={"fidelity": 0.0})["error"].isna().all()


def test_the_signature_is_pictures_in_pictures_and_errors_out(model: PyFuncModel) -> None:
    signature = model.metadata.signature
    assert [(c.name, c.type.name, c.required) for c in signature.inputs] == [("image", "binary", True)]
    assert [(c.name, c.type.name, c.required) for c in signature.outputs] == [
        ("image", "binary", True),
        ("error", "string", False),
    ]
    assert {p.name: (p.dtype.name, p.default) for p in signature.params} == {
        "quality": ("double", 0.95),
        "fidelity": ("double", 0.0),
    }


def test_answers_can_be_served_as_json(model: PyFuncModel) -> None:
    answer = model.predict(pd.DataFrame({"image": [encode_png(draw_picture(6, 32)), b"text"]}))
    out = io.StringIO()
    predictions_to_json(answer, out)
    good, bad = json.loads(out.getvalue())["predictions"]
    assert good["error"] is None and good["image"].startswith("iVBOR")
    assert bad["image"] is None and bad["error"].startswith("not_an_image")


def test_requirements_are_pinned_and_have_no_training_library(package: Package, tmp_path: Path) -> None:
    save(package, tmp_path / "model")
    lines = (tmp_path / "model" / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in lines} == {
        "mlflow",
        "numpy",
        "pandas",
        "pillow",
        "safetensors",
        "torch",
    }
    assert all("==" in line and "+" not in line for line in lines)
    assert not list((tmp_path / "model").rglob("*.pkl")) and not list((tmp_path / "model").rglob("*.pyc"))


def test_an_altered_file_is_noticed_before_it_is_loaded(package: Package, tmp_path: Path) -> None:
    save(package, tmp_path / "model")
    weights = tmp_path / "model" / "artifacts" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(MlflowException, match=r"model\.safetensors is not the file"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_two_versions_in_one_process_each_run_their_own_code(
    checkpoint: Path, model: PyFuncModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    changed = other_code(
        tmp_path,
        "pixels.py",
        "Image.fromarray(array).save(buffer",
        "Image.fromarray(255 - array).save(buffer",
    )
    with monkeypatch.context() as patch:
        patch.setattr(packaging, "_root_folder", lambda: changed)
        other = build_package(checkpoint, tmp_path / "built")
    save(other, tmp_path / "model")
    second = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    rows = pd.DataFrame({"image": [encode_png(draw_picture(7, 32))]})
    ours, theirs = (decode(m.predict(rows)["image"][0]).array for m in (model, second))
    assert np.array_equal(theirs, 255 - ours)
    assert np.array_equal(decode(model.predict(rows)["image"][0]).array, ours)
    assert Path(importlib.import_module(f"{other.name}.restorer").__file__ or "").is_relative_to(tmp_path / "model")
    assert sys.modules[f"{other.name}.pixels"] is not sys.modules["iqpir.pixels"]
