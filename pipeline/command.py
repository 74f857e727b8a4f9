"""Turn a verb and its configuration class into a job: flags, recipes, one JSON line, an exit code.

Every job has the same contract (docs/jobs.md): ``--config recipe.yaml`` and ``--dotted.key value``
overrides, ``--help`` and ``--print_config``; people read stderr, machines the last line of stdout.
"""

import dataclasses
import difflib
import itertools
import json
import logging
import os
import re
import signal
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from iqpir.errors import IncompleteError, IqpirError, PermanentError, UsageError

JOBS = (
    *(
        "demo",
        "preflight",
        "shard",
        "score",
        "label",
        "dedup",
        "curate",
        "report",
        "explore",
        "degrade",
        "encode",
        "export",
    ),
    *("stage1", "stage2", "stage3", "evaluate", "register", "promote", "restore"),
    *("verify", "gc", "status", "fit_metric", "ablation", "bench"),
)
"""Names of the jobs, hence of a recipe's sections."""
SHARED = "all"
"""Recipe section whose keys reach every job that has a field of that name."""


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of a description: they hold commands."""


class Result(Protocol):
    """What a verb returns: a dataclass of JSON values.

    It may have an ``exit_code``, and ``speaks``: False where another process prints the result.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]


_MOST_TOLD = 600

C = TypeVar("C")
R = TypeVar("R", bound=Result)


def command(action: Callable[[C], R], config_type: type[C], argv: Sequence[str] | None = None) -> None:
    """Run ``action`` on the configuration in ``argv`` and leave the process with its exit code.

    Args:
        action: the verb.
        config_type: frozen dataclass; its fields are the flags, their docstrings the help.
        argv: arguments after the program's name; those of the process by default.

    The help text opens with the docstring of the script that is run.

    Exit codes: 0 done, 1 or 2 usage, 3 incomplete, 4 verification failed, 5 failed for good.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, wherever a job does nothing better about it
    arguments, script = sys.argv[1:] if argv is None else argv, Path(sys.argv[0]).stem
    sys.exit(run(action, config_type, arguments, script, sys.modules["__main__"].__doc__ or ""))


def run(action: Callable[[C], R], config_type: type[C], argv: Sequence[str], job: str, description: str = "") -> int:
    """As ``command``, returning the exit code; ``description`` opens the help text."""
    log_to_stderr()
    with _Mistake(job):
        return _run(action, config_type, argv, job, description)
    return PermanentError.exit_code


def _run(action: Callable[[C], R], config_type: type[C], argv: Sequence[str], job: str, description: str) -> int:
    try:
        config = parse(config_type, argv, job, description)
        result = action(config)
    except _expected() as error:
        told = _told(error)
        if told is None:
            raise
        sys.stderr.write(f"{job}: {told}\n")
        return told.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{job}: interrupted; the same command goes on where it stopped.\n")
        return 3
    if getattr(result, "speaks", True):
        values = dataclasses.asdict(result)
        sys.stdout.write(json.dumps(values, sort_keys=True, default=str) + "\n")
        sys.stdout.flush()
    return int(getattr(result, "exit_code", 0))


class _Mistake:
    """Shows what nothing made sense of, a mistake of the program, with its traceback."""

    def __init__(self, job: str) -> None:
        self.job = job

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        sys.stderr.write(
            f"{self.job}: {type(error).__name__} is a mistake of the program; report it with these lines.\n"
        )
        return True


def _expected() -> tuple[type[Exception], ...]:
    return (IqpirError, OSError, *_of_servers())


def _of_servers() -> tuple[type[Exception], ...]:
    """What clients of MLflow and Ray raise; of those that are loaded, as no other one can raise."""
    known = (("mlflow.exceptions", "MlflowException"), ("ray.exceptions", "RayError"))
    return tuple(getattr(sys.modules[module], name) for module, name in known if module in sys.modules)


def parse(config_type: type[C], argv: Sequence[str], job: str, description: str = "") -> C:
    """The configuration that ``argv`` describes: defaults, then the recipe, then flags.

    Raises:
        UsageError: an unknown key (naming the nearest known one) or a value of the wrong type.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    parser = _parser(config_type, job, description)
    known = _keys(parser)
    try:
        named = _with_recipe(_named(argv, config_type), config_type)
        values = parser.instantiate(parser.parse_args(_arguments(named, known, job)))
    except (ArgumentError, TypeError, ValueError) as error:
        raise _usage(error, known, job) from error
    return _built(config_type, values)


def from_dict(config_type: type[C], values: Mapping[str, Any]) -> C:
    """Inverse of ``dataclasses.asdict`` for a configuration that travelled as plain JSON values.

    Raises:
        UsageError: an unknown key or a value of the wrong type.
    """
    parser = _parser(config_type, config_type.__name__, "")
    try:
        built = parser.instantiate(parser.parse_object(json.loads(json.dumps(values))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise _usage(error, _keys(parser), config_type.__name__) from error
    return _built(config_type, built)


def _parser(config_type: type[Any], job: str, description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=job, description=description, formatter_class=_Help, exit_on_error=False)
    parser.add_argument("--config", action="config", help="Recipe: a YAML file; docs/jobs.md.")
    parser.add_class_arguments(config_type)
    return parser


def _built(config_type: type[C], values: Namespace) -> C:
    fields = {field.name for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    return config_type(**{name: values[name] for name in fields})


def _keys(parser: ArgumentParser) -> dict[str, bool]:
    """Dotted name of every flag, and whether it is a yes-or-no one."""
    names = {}
    for name, value in _walk(parser.get_defaults()):
        names[name] = isinstance(value, bool)
    for action in parser._actions:
        if action.dest not in ("help", "print_config", "config"):
            names.setdefault(action.dest, False)
    return names


def _walk(namespace: Namespace) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in namespace.items() if key not in ("config", "print_config")]


def _named(argv: Sequence[str], config_type: type[Any]) -> list[str]:
    """A first argument without dashes is the value of the field that the class names as ``POSITIONAL``."""
    field = getattr(config_type, "POSITIONAL", "")
    return [f"--{field}", *argv] if field and argv and not argv[0].startswith("-") else list(argv)


def _with_recipe(argv: list[str], config_type: type[Any]) -> list[str]:
    """The path after ``--config`` is also the value of the field that the class names as ``RECIPE``."""
    field = getattr(config_type, "RECIPE", "")
    paths = [following for token, following in itertools.pairwise(argv) if token == "--config"]
    paths += [token.partition("=")[2] for token in argv if token.startswith("--config=")]
    return [f"--{field}", paths[-1], *argv] if field and paths else argv


def _arguments(argv: Sequence[str], known: dict[str, bool], job: str) -> list[str]:
    """Dashes to underscores, bare yes-or-no flags to values, recipe files to this job's section."""
    arguments: list[str] = []
    tokens = list(argv)
    for position, token in enumerate(tokens):
        following = tokens[position + 1] if position + 1 < len(tokens) else "--"
        if not token.startswith("--"):
            arguments.append(_section(token, known, job) if position and tokens[position - 1] == "--config" else token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and known.get(name[3:]) and not equals:
            arguments += [f"--{name[3:]}", "false"]
        elif name == "config" and equals:
            arguments += ["--config", _section(value, known, job)]
        elif known.get(name) and not equals and following.startswith("--"):
            arguments += [f"--{name}", "true"]
        else:
            arguments.append(f"--{name}{equals}{value}")
    return arguments


def _section(path: str, known: dict[str, bool], job: str) -> str:
    """The part of a recipe file that is meant for ``job``, as YAML text.

    A recipe is either flat (this job's keys) or has one section a job, and a section ``all`` whose keys
    reach each job that has a field of that name.
    """
    recipe = _recipe(path)
    sections = _sections(recipe)
    if not sections:
        return json.dumps(recipe)
    for name in recipe:
        if name not in sections:
            raise UsageError(f"The recipe {path} has an unknown section {name!r}.{_nearest(name, [*JOBS, SHARED])}")
    shared = {
        key: value
        for key, value in (recipe.get(SHARED) or {}).items()
        if key in known or any(name.startswith(f"{key}.") for name in known)
    }
    return json.dumps({**shared, **(recipe.get(job) or {})})


def sections_of(path: str) -> list[str]:
    """The jobs that a recipe has a section for, in its order; none where it is flat.

    Raises:
        UsageError: it cannot be read.
    """
    return [name for name in _sections(_recipe(path)) if name != SHARED]


def _recipe(path: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(_expanded(Path(path).read_text(encoding="utf-8"), path)) or {}
    except OSError as error:
        raise UsageError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"The recipe {path} is no YAML: {error}.") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"The recipe {path} is no mapping of keys to values.")
    return recipe


def _sections(recipe: Mapping[str, Any]) -> list[str]:
    # A job's name may also be a key: stage 2 has a field ``stage1``, whose value is a text.
    names = (*JOBS, SHARED)
    return [name for name, value in recipe.items() if name in names and (value is None or isinstance(value, dict))]


def workspace() -> str:
    """Where jobs keep things that no flag places: ``$IQPIR_WORKSPACE`` (a folder or URL), or ``~/.iqpir``."""
    return os.environ.get("IQPIR_WORKSPACE") or str(Path.home() / ".iqpir")


def _expanded(text: str, path: str) -> str:
    """Replace ``${NAME}`` by the environment's value, so that one recipe serves many clusters."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name == "IQPIR_WORKSPACE":
            return workspace()
        if name not in os.environ:
            raise UsageError(f"The recipe {path} needs the environment variable {name}.", f"Set {name}.")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _usage(error: BaseException, known: dict[str, bool], job: str) -> UsageError:
    """One line from jsonargparse's error, with the nearest key where one is unknown."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UsageError):
            return cause
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    unknown = (
        re.search(r"[Uu]nrecognized arguments?: (?:--)?([\w.\-]+)", text)
        or re.search(r"(?:Key|Option|key|option) '([\w.\-]+)' is not (?:expected|accepted)", text)
        or re.search(r"Group '([\w.]+)' does not accept option '([\w.\-]+)'", text)
    )
    if unknown:
        key = ".".join(unknown.groups())
        return UsageError(f"Unknown key {key!r}.{_nearest(key, list(known))}", f"See {job} --help.")
    return UsageError(f"{text.rstrip('.')}.", f"See {job} --help.")


def _told(error: Exception) -> IqpirError | None:
    """What a user is told about a failure of disk, network or servers that no step could make sense of.

    None: it is a mistake of the program, brought here from a task of Ray.
    """
    brought = getattr(error, "cause", None)
    error = brought if isinstance(brought, Exception) else error
    if isinstance(error, IqpirError):
        return error
    text = " ".join(str(error).split())[:_MOST_TOLD].rstrip(".") or type(error).__name__
    if isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError)):
        return UsageError(f"{text}.", "Check the path and its permissions.")
    if isinstance(error, OSError):
        return IncompleteError(f"{text}.", "Put that right; the same command goes on where it stopped.")
    if not isinstance(error, _of_servers()):
        return None
    status = getattr(error, "get_http_status_code", int)()
    if 400 <= status < 500 and status not in (408, 429):
        return UsageError(f"MLflow refuses: {text}.", "Look at the names and rights that it speaks of.")
    server = type(error).__module__.partition(".")[0].replace("mlflow", "MLflow").replace("ray", "Ray")
    return IncompleteError(f"{server} failed: {text}.", "When it is well, the same command goes on where it stopped.")


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" Known: {', '.join(sorted(known))}."


def log_to_stderr() -> None:
    """Warnings of libraries and the project's own messages, to stderr, in one format."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for package in ("iqpir", "pipeline"):
        logging.getLogger(package).setLevel(logging.INFO)
