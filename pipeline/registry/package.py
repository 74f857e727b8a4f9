"""Build what is registered: weights, configuration, and the inference code under a name of its own.

``code_paths`` of two model versions share one ``sys.path``: with equal package names the second version would
silently run the first one's code. So the import closure of ``iqpir.restorer`` is copied as
``iqpir_<sha8 of its contents>``, and import lines are rewritten to it.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from iqpir.errors import PermanentError
from iqpir.pixels import encode_png
from iqpir.training.checkpoint import MANIFEST, file_sha256

ROOT = "iqpir"
ENTRY = "iqpir.restorer"
ALLOWED = frozenset({"torch", "numpy", "safetensors", "PIL"})
"""Third-party packages the inference code may import."""
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch")
"""Distributions of the model's own environment; pinned to the versions here."""
MODEL_FILE = Path(__file__).with_name("pyfunc_model.py")
"""The models-from-code file."""
WEIGHTS, CONFIG, RECORD = "model.safetensors", "config.json", "package.json"


SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "image")]),
    outputs=Schema([ColSpec("binary", "image"), ColSpec("string", "error", required=False)]),
    params=ParamSchema([ParamSpec("quality", "double", 0.95), ParamSpec("fidelity", "double", 0.0)]),
)
"""Picture bytes in, PNG bytes and an error text per row out."""


@dataclass(frozen=True)
class Package:
    """A model folder and the code that runs it, ready to be logged."""

    name: str
    """Name of the vendored package: ``iqpir_<sha8>``."""
    code: Path
    """Folder of that package."""
    model: Path
    """Folder with model.safetensors, config.json and package.json."""
    checkpoint_digest: str
    """sha256 of the checkpoint's manifest: 64 hex digits."""
    model_digest: str
    """sha256 of package.json, which holds those of the other files of the model folder."""


def build_package(checkpoint: Path, destination: Path) -> Package:
    """Write ``<destination>/iqpir_<sha8>/`` and ``<destination>/model/``.

    Args:
        checkpoint: a verified checkpoint directory.
        destination: an empty or absent folder.

    Raises:
        PermanentError: the inference code imports what a registered model may not need.
    """
    modules = closure(ENTRY)
    foreign = {name: found for name, path in modules.items() if (found := foreign_imports(path) - ALLOWED)}
    if foreign:
        raise PermanentError(
            f"The inference code needs more than {', '.join(sorted(ALLOWED))}: {foreign}.",
            "Keep such imports out of what iqpir.restorer imports.",
        )
    name = f"{ROOT}_{_content_digest(modules)[:8]}"
    code = destination / name
    for path in modules.values():
        target = code / path.relative_to(_root_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(renamed(path.read_bytes(), name))
    model = destination / "model"
    model.mkdir(parents=True)
    for file in (WEIGHTS, CONFIG):
        shutil.copyfile(checkpoint / file, model / file)
    digest = file_sha256(checkpoint / MANIFEST)
    record = {
        "package": name,
        "checkpoint": digest,
        "files": {file: file_sha256(model / file) for file in (WEIGHTS, CONFIG)},
    }
    (model / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Package(name, code, model, digest, file_sha256(model / RECORD))


def save(package: Package, target: Path, run_id: str = "", model_id: str = "", location: str = "") -> None:
    """Write an MLflow model folder: models-from-code, safetensors, vendored code, pinned requirements."""
    mlflow.pyfunc.save_model(
        path=str(target),
        python_model=str(MODEL_FILE),
        code_paths=[str(package.code)],
        artifacts={"model": str(package.model)},
        signature=SIGNATURE,
        input_example=pd.DataFrame({"image": [encode_png(np.full((8, 8, 3), 128, np.uint8))]}),
        pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        mlflow_model=Model(
            artifact_path=location or None,
            run_id=run_id or None,
            model_uuid=model_id or None,
            model_id=model_id or None,
        ),
    )
    for cache in target.rglob("__pycache__"):
        for file in cache.iterdir():
            file.unlink()
        cache.rmdir()


def closure(entry: str) -> dict[str, Path]:
    """Every module of iqpir that ``entry`` imports, directly or not, at any place in a file.

    Returns:
        module name to source file, sorted; packages by their ``__init__``.
    """
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        path = _source(module)
        if path is None or module in found:
            continue
        found[module] = path
        waiting += [".".join(module.split(".")[:depth]) for depth in range(1, module.count(".") + 1)]
        for name in _imports(path):
            if name.split(".")[0] == ROOT:
                waiting.append(name)
    return dict(sorted(found.items()))


def foreign_imports(path: Path) -> set[str]:
    """Top-level names a file imports that are neither iqpir nor of the standard library."""
    tops = {name.split(".")[0] for name in _imports(path)}
    return tops - sys.stdlib_module_names - {ROOT}


def renamed(source: bytes, package: str) -> bytes:
    """The source with ``iqpir`` in import statements replaced by ``package``; nothing else changes.

    Raises:
        PermanentError: ``import iqpir.x`` without ``as``: its later uses would still say ``iqpir``.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise PermanentError("The inference code has a relative import.", "Import from iqpir.")
            if node.module and node.module.split(".")[0] == ROOT:
                _replace(lines, node.lineno, node.col_offset, rb"(from\s+)iqpir\b", package)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] != ROOT:
                    continue
                if alias.asname is None:
                    raise PermanentError(f"The inference code says 'import {alias.name}'.", "Use 'from ... import'.")
                _replace(lines, alias.lineno, alias.col_offset, rb"()iqpir\b", package)
    return b"".join(lines)


def _replace(lines: list[bytes], number: int, column: int, pattern: bytes, package: str) -> None:
    line = lines[number - 1]
    new, count = re.subn(pattern, rb"\g<1>" + package.encode(), line[column:], count=1)
    if count != 1:
        raise PermanentError(f"Cannot rewrite the import {line.strip().decode()!r}.", "Write it on one line.")
    lines[number - 1] = line[:column] + new


def _imports(path: Path) -> Iterator[str]:
    """Every module a file may import. ``from a import b`` gives ``a`` and ``a.b``: b may be a module."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _source(module: str) -> Path | None:
    """File of an iqpir module, or None where the name is no module."""
    path = _root_folder().joinpath(*module.split(".")[1:])
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() and path != _root_folder() else None


def _root_folder() -> Path:
    spec = importlib.util.find_spec(ROOT)
    if spec is None or spec.origin is None:
        raise PermanentError("The package iqpir has no source files here.", "Install it from its sources.")
    return Path(spec.origin).parent


def _content_digest(modules: dict[str, Path]) -> str:
    total = hashlib.sha256()
    for name, path in modules.items():
        total.update(f"{name} {file_sha256(path)}\n".encode())
    return total.hexdigest()


def _public_version(name: str) -> str:
    """Without a local part such as ``+cpu``, which no package index has."""
    return importlib.metadata.version(name).partition("+")[0]
