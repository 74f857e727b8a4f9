"""The jobs as their scripts define them: which verb, which configuration."""

import ast
import functools
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.command import parse
from tests.source_files import REPOSITORY


@dataclass(frozen=True)
class Job:
    """What ``jobs/<name>.py`` hands to ``command``."""

    name: str
    verb: Callable[[Any], Any]
    config_type: type[Any]
    docstring: str

    def parse(self, *argv: str) -> Any:
        """The configuration that these arguments describe."""
        return parse(self.config_type, argv, self.name, self.docstring)


@functools.cache
def job(name: str) -> Job:
    """Read the script; its imports are done, ``command`` is not called."""
    path = REPOSITORY / "jobs" / f"{name}.py"
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "command"]
    assert len(calls) == 1, f"{path.name} calls command {len(calls)} times"
    names = runpy.run_path(str(path), run_name=f"jobs.{name}")
    verb, config_type = (names[ast.unparse(argument)] for argument in calls[0].args)
    return Job(name, verb, config_type, ast.get_docstring(tree) or "")
