"""What holds for every file: jobs are thin, configurations are documented, importing does nothing but define."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.command import JOBS
from tests.source_files import REPOSITORY, job_files, python_files, source_files

JOB_FILES = job_files()
CODE = python_files("iqpir", "pipeline")
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "tools"}
RUNS_WHEN_IMPORTED = {"pipeline/registry/pyfunc_model.py"}
"""MLflow's models-from-code calls this file: setting the model is what it is for."""
NEEDS_AN_EXTRA = {"pipeline/exports/beton_writer.py": "ffcv"}
"""A program of its own, and the package of an extra without which it cannot start."""
WRITTEN_BY_LIBRARIES = {".config/mlflow/telemetry.json"}
"""What importing mlflow leaves in the home directory."""


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def test_the_lists_that_these_tests_go_through_are_not_empty() -> None:
    assert len(JOB_FILES) > 20 and len(CODE) > 80


def test_the_jobs_that_recipes_may_name_are_the_scripts_in_jobs() -> None:
    assert sorted(JOBS) == sorted(path.stem for path in JOB_FILES)
    assert len(set(JOBS)) == len(JOBS)


@pytest.mark.parametrize("path", JOB_FILES, ids=relative)
def test_a_job_is_an_executable_script_of_a_few_lines_that_shows_how_it_is_called(path: Path) -> None:
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env python\n")
    assert len(text.splitlines()) <= 40
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"jobs/{path.name}" in docstring, "the docstring has no example"
    assert docstring.splitlines()[0].strip()


@pytest.mark.parametrize("path", JOB_FILES, ids=relative)
def test_a_job_shadows_no_module_of_the_standard_library(path: Path) -> None:
    """A script's folder is first on ``sys.path``: jobs/select.py would be what ``import select`` finds.

    Modules that are built into the interpreter (``gc``) are found before any folder, so those names are safe.
    """
    assert path.stem not in set(sys.stdlib_module_names) - set(sys.builtin_module_names)


def test_a_name_that_a_job_shares_with_a_built_in_module_leads_to_the_built_in_one() -> None:
    shared = [path.stem for path in JOB_FILES if path.stem in sys.builtin_module_names]
    assert shared == ["gc"]
    script = "import sys; sys.path.insert(0, 'jobs'); import gc; print(gc.isenabled())"
    assert run_python("-c", script).stdout == "True\n"


def test_no_file_or_folder_is_named_after_nothing() -> None:
    parts = {part for path in python_files("iqpir", "pipeline", "jobs", "infra", "tests") for part in named(path)}
    assert not parts & BANNED_NAMES


def named(path: Path) -> tuple[str, ...]:
    return path.relative_to(REPOSITORY).with_suffix("").parts


def test_importing_iqpir_loads_no_torch() -> None:
    script = "import sys, iqpir; print(iqpir.__version__, 'torch' in sys.modules, 'numpy' in sys.modules)"
    assert run_python("-c", script).stdout.split()[1:] == ["False", "False"]


@pytest.mark.parametrize("module", ["pipeline.command", "pipeline.storage", "pipeline.corpus", "pipeline.shard"])
def test_what_every_job_needs_loads_no_torch_ray_or_mlflow(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'torch', 'ray', 'mlflow', 'pyiqa'}} & set(sys.modules)))"
    assert run_python("-c", script).stdout == "[]\n"


@pytest.mark.slow
def test_every_module_imports_and_writes_nothing(tmp_path: Path) -> None:
    """In an empty environment: home, current and temporary folder stay empty, the log has no new handler."""
    modules = [
        ".".join(named(path)).removesuffix(".__init__")
        for path in CODE
        if relative(path) not in RUNS_WHEN_IMPORTED and find_spec(NEEDS_AN_EXTRA.get(relative(path), "json"))
    ]
    folders = {name: tmp_path / name for name in ("home", "current", "temporary")}
    for folder in folders.values():
        folder.mkdir()
    script = (
        "import importlib, logging, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "assert not logging.getLogger().handlers, logging.getLogger().handlers\n"
        "print(sum(name in sys.modules for name in sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *modules],
        cwd=folders["current"],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folders["home"]),
            "TMPDIR": str(folders["temporary"]),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(modules)}\n"
    written = {path.relative_to(folders["home"]).as_posix() for path in folders["home"].rglob("*") if path.is_file()}
    assert written <= WRITTEN_BY_LIBRARIES
    assert not list(folders["current"].iterdir()) and not list(folders["temporary"].iterdir())


def test_importing_a_module_does_nothing_but_define() -> None:
    """No bare call and no look at the environment outside functions, where it would freeze at import."""
    found = []
    for path in CODE:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and relative(path) not in RUNS_WHEN_IMPORTED
            ):
                found.append(f"{relative(path)}:{node.lineno} calls")
        for inner in run_at_import(tree):
            if isinstance(inner, ast.Attribute) and inner.attr in ("environ", "getenv", "argv"):
                found.append(f"{relative(path)}:{inner.lineno} reads the environment")
    assert not found


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that importing executes: everything outside functions, and defaults of their arguments."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            for default in (*child.args.defaults, *child.args.kw_defaults, *child.decorator_list):
                if default is not None:
                    yield default
                    yield from run_at_import(default)
        elif isinstance(child, ast.Lambda) or (isinstance(child, ast.If) and "__main__" in ast.unparse(child.test)):
            continue
        else:
            yield child
            yield from run_at_import(child)


def test_no_error_is_caught_blindly_and_nothing_is_mocked() -> None:
    found = []
    for path in python_files("iqpir", "pipeline", "jobs", "infra", "tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and caught_by(node) & {"", "Exception", "BaseException"}:
                found.append(f"{relative(path)}:{node.lineno}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
                if {"mock", "unittest.mock"} & modules:
                    found.append(f"{relative(path)}:{node.lineno}")
    assert not found


def caught_by(handler: ast.ExceptHandler) -> set[str]:
    """Names of the classes that it catches; an empty name where it catches all."""
    caught = handler.type
    return {ast.unparse(each) for each in (caught.elts if isinstance(caught, ast.Tuple) else [caught]) if each} or {""}


def test_no_file_knows_a_machine() -> None:
    """Paths of one machine do not belong into the repository."""
    folders = re.compile(rb"(?<![\w.-])/(work|farm|root|home/ubuntu|Users)/")
    assert not [relative(path) for path in source_files() if folders.search(path.read_bytes())]


def test_every_document_that_a_file_names_exists() -> None:
    missing = {
        f"{relative(path)}: {name}"
        for path in [*source_files("*.py"), *source_files("*.md"), *source_files("*.yaml"), *source_files("*.toml")]
        for name in re.findall(r"docs/[\w./-]+\.md", path.read_text())
        if not (REPOSITORY / name).is_file()
    }
    assert not missing


def dataclasses_of(folder: str) -> list[tuple[Path, ast.ClassDef, str]]:
    return [
        (path, node, ast.unparse(decorator))
        for path in python_files(folder)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if "dataclass" in ast.unparse(decorator)
    ]


CONFIGURATIONS = [
    pytest.param(node, decorator, id=f"{path.stem}.{node.name}")
    for path, node, decorator in dataclasses_of("pipeline")
    if node.name.endswith(("Config", "Training", "Policy", "Workers"))
]


@pytest.mark.parametrize(("node", "decorator"), CONFIGURATIONS)
def test_a_configuration_is_frozen_by_keyword_and_says_what_each_field_is(node: ast.ClassDef, decorator: str) -> None:
    assert "frozen=True" in decorator and "kw_only=True" in decorator
    assert ast.get_docstring(node)
    for position, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or "ClassVar" in ast.unparse(statement.annotation):
            continue
        following = node.body[position + 1] if position + 1 < len(node.body) else None
        said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        assert said, f"{ast.unparse(statement.target)} has no docstring, so no help text"


def test_configurations_were_found() -> None:
    assert len(CONFIGURATIONS) > 20


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
