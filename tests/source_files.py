"""The files of this repository, for tests that read them."""

import functools
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_SKIPPED = frozenset(["build", "dist", "workspace", "runs", "mlruns", "mlartifacts", "__pycache__"])


@functools.cache
def source_files(pattern: str = "*") -> tuple[Path, ...]:
    """Files that are, or would be, in the repository; without git (an archive, a copied tree) by their places."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and (REPOSITORY / ".git").exists():
        found = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    else:
        found = [path for path in REPOSITORY.rglob("*") if _ours(path.relative_to(REPOSITORY))]
    return tuple(sorted(path for path in found if path.is_file() and path.match(pattern)))


def _ours(path: Path) -> bool:
    return not any(part in _SKIPPED or (part.startswith(".") and part != ".ci") for part in path.parts[:-1])


def python_files(*folders: str) -> list[Path]:
    """Python files below these folders of the repository."""
    return [path for path in source_files("*.py") if path.relative_to(REPOSITORY).parts[0] in folders]


def job_files() -> list[Path]:
    """The scripts in jobs/."""
    return [path for path in python_files("jobs") if path.parent.name == "jobs"]
