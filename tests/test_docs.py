"""What the documents say can be done as they say it: commands parse, files exist, the curators' part runs."""

import ast
import dataclasses
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from pipeline.command import JOBS
from tests.chain import write_pictures
from tests.conftest import draw_picture
from tests.jobs.scripts import job
from tests.pipeline.tiny_checkpoint import write_checkpoint
from tests.source_files import REPOSITORY, python_files

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "infra/README.md"]
NOT_HERE = {"infra/docker/.env", "jobs/NAME.py"}
"""A file that the reader makes, and what stands for any job."""
NOT_OF_JOBS = {"--config", "--help", "--print_config", "--dotted.key", "--flag", "--no-flag"}
"""Flags that every job has, and examples of the notation."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_JOB = re.compile(r"jobs/([\w$]+)\.py(.*)")
_LOOP = re.compile(r"for (\w+) in ([^;]+); do\n(.*?)\ndone", re.DOTALL)
_OPERATORS = {";", "|", "&&", "||", "&", ">", "<"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.document.relative_to(REPOSITORY)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    return [
        Block(path, match[1], match[2], text[: match.start()].count("\n") + 1)
        for path in DOCUMENTS
        for text in [path.read_text()]
        for match in _FENCE.finditer(text)
        if match[1] in languages
    ]


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", path.read_text())


def job_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each job that a shell script starts; loops over names are unrolled."""
    text = text.replace("\\\n", " ")
    for variable, values, body in _LOOP.findall(text):
        yield from itertools.chain.from_iterable(
            job_commands(body.replace(f"${variable}", value)) for value in values.split() if f"${variable}" in body
        )
    for line in _LOOP.sub("", text).splitlines():
        found = _JOB.search(line)
        if found:
            words = shlex.split(found[2], comments=True)
            ends = [position for position, word in enumerate(words) if word in _OPERATORS]
            yield found[1], [os.path.expandvars(word) for word in words[: ends[0] if ends else None]]


COMMANDS = [
    pytest.param(name, arguments, id=f"{block}-{name}")
    for block in blocks("bash", "text")
    for name, arguments in job_commands(block.text)
]
EXAMPLES = [
    pytest.param(name, arguments, id=f"jobs/{script}.py-{number}")
    for script in JOBS
    for number, (name, arguments) in enumerate(job_commands(job(script).docstring))
]


def test_commands_were_found() -> None:
    assert {"shard", "score", "label", "curate", "report", "verify", "stage1", "encode", "stage2"} <= {
        parameter.values[0] for parameter in COMMANDS
    }
    assert len(COMMANDS) >= 18 and len(EXAMPLES) >= len(JOBS)


def test_what_reads_commands_sees_loops_comments_and_operators() -> None:
    script = (
        "for job in shard score; do\n  python jobs/$job.py --corpus c\ndone\nx -- python jobs/gc.py --a 1 && b  # c"
    )
    assert list(job_commands(script)) == [
        ("shard", ["--corpus", "c"]),
        ("score", ["--corpus", "c"]),
        ("gc", ["--a", "1"]),
    ]


@pytest.mark.parametrize(("name", "arguments"), [*COMMANDS, *EXAMPLES])
def test_each_command_is_understood_by_its_job(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            job(name).parse(*arguments)
        assert ended.value.code == 0
    elif arguments[-1:] != ["..."]:
        job(name).parse(*arguments)


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_a_shell_block_is_shell(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_compiles(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_python_inside_a_shell_block_compiles(block: Block) -> None:
    for script in re.findall(r"<<'PY'\n(.*?)^PY$", block.text, re.MULTILINE | re.DOTALL):
        ast.parse(script)


def test_no_block_is_of_a_language_that_no_test_reads() -> None:
    known = {"bash", "python", "text"}
    languages = {match[1] for path in DOCUMENTS for match in _FENCE.finditer(path.read_text())}
    assert languages <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
class TestNames:
    def test_make_targets_exist(self, path: Path) -> None:
        makefile = (REPOSITORY / "Makefile").read_text()
        targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
        text = path.read_text()
        inside = " ".join([*(match[2] for match in _FENCE.finditer(text)), *re.findall(r"`([^`\n]+)`", prose(path))])
        assert set(re.findall(r"(?:^|\s)make ([a-z]+)", inside)) <= targets
        for variable in re.findall(r"make [a-z]+ ([A-Z]+)=", inside):
            assert f"$({variable})" in makefile

    def test_files_exist(self, path: Path) -> None:
        found = re.findall(
            r"(?<![\w/.$:{}-])((?:jobs|pipeline|iqpir|infra|docs|tests)/[\w./-]*\w)(?![\w*<{$])", path.read_text()
        )
        missing = {name for name in found if not (REPOSITORY / name).exists()} - NOT_HERE
        assert not {name for name in missing if "." in name.rsplit("/", 1)[1]}

    def test_links_lead_somewhere(self, path: Path) -> None:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            document = path.parent / name if name else path
            assert document.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def test_tests_that_a_document_names_exist(self, path: Path) -> None:
        named = set(re.findall(r"`(test_\w+)`", path.read_text()))
        tests = "\n".join(file.read_text() for file in python_files("tests"))
        assert named <= set(re.findall(r"def (test_\w+)\(", tests))

    def test_flags_in_the_text_are_flags_of_jobs(self, path: Path) -> None:
        if path.parent.name == "infra":
            return  # speaks of flags of other programs
        known = {f"--{name}" for script in JOBS for name in flags(job(script).config_type)}
        said = {
            flag
            for code in re.findall(r"`([^`\n]+)`", prose(path))
            if not code.startswith(("ray ", "docker ", "--runtime-env-json"))
            for flag in re.findall(r"--[a-z][\w.-]*", code)
        }
        for flag in said - NOT_OF_JOBS:
            name = flag.replace("-", "_").replace("__", "--", 1)
            assert name in known or name.replace("--no_", "--") in known, flag


def flags(config_type: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of a configuration's fields."""
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        yield prefix + field.name
        if inspect.isclass(hints[field.name]) and dataclasses.is_dataclass(hints[field.name]):
            yield from flags(hints[field.name], f"{prefix}{field.name}.")


FIGURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")


def figures_of(path: Path) -> dict[Path, str]:
    """Figures that a document shows -> what it says they are, for who cannot see them."""
    shown = [(markdown or html, words) for words, markdown, html in FIGURE.findall(prose(path))]
    return {(path.parent / name).resolve(): words for name, words in shown if "://" not in name}


SHOWING = sorted({*DOCUMENTS, *(REPOSITORY / "docs").rglob("*.md")})
DRAWN = sorted((REPOSITORY / "docs").rglob("*.svg"))


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_each_figure_that_a_document_shows_exists_and_is_described(path: Path) -> None:
    for figure, words in figures_of(path).items():
        assert figure.is_file(), figure
        assert words or figure.suffix == ".svg", f"{figure.name} has no description"


def test_every_figure_is_shown_by_a_document() -> None:
    shown = {figure for path in SHOWING for figure in figures_of(path)}
    kept = {figure.resolve() for figure in (*DRAWN, *(REPOSITORY / "docs").rglob("*.png"))}
    assert len(kept) >= 8 and not kept - shown


@pytest.mark.parametrize("figure", DRAWN, ids=lambda path: path.name)
def test_a_drawing_is_well_formed_and_loads_and_runs_nothing(figure: Path) -> None:
    text = figure.read_text()
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert "svg" in tags and not tags & {"script", "image", "foreignObject"}
    assert not re.search(r"@import|@font-face|url\((?!['\"]?#)", text)


@pytest.mark.parametrize("figure", sorted((REPOSITORY / "docs/figures").glob("*.svg")), ids=lambda path: path.name)
def test_a_figure_of_the_method_can_be_read_by_everybody(figure: Path) -> None:
    """With a title, on its own ground, in letters of 12 pixels or more, and in styles that it has itself."""
    root = ElementTree.fromstring(figure.read_text())
    name = "{http://www.w3.org/2000/svg}"
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert root.findtext(f"{name}title") and root.findtext(f"{name}desc")
    ground = root.find(f"{name}rect")
    assert ground is not None and ground.get("fill") == "#ffffff"
    style = root.findtext(f"{name}style") or ""
    sizes = [float(size) for size in re.findall(r"(\d+(?:\.\d+)?)px", style)]
    assert sizes and min(sizes) >= 12
    styled = set(re.findall(r"\.([a-z]\w*) \{", style))
    assert {each for element in root.iter() for each in element.get("class", "").split()} <= styled


def test_the_table_of_jobs_has_each_job_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (REPOSITORY / "docs/jobs.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(JOBS)


def test_architecture_is_at_most_a_page() -> None:
    assert len((REPOSITORY / "docs/architecture.md").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_the_restorer_of_the_readme_restores(tmp_path: Path) -> None:
    """The block that needs no MLflow, as it is written, on a checkpoint of random weights."""
    script = next(block.text for block in blocks("python") if "Restorer.load" in block.text)
    write_checkpoint(tmp_path / "checkpoint")
    Image.fromarray(draw_picture(1, 48)).save(tmp_path / "degraded.png")
    shown = "\nimport io\nfrom PIL import Image\nprint(Image.open(io.BytesIO(restored)).size)"
    done = subprocess.run(
        [sys.executable, "-c", script + shown],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(48, 48)\n"


@pytest.mark.slow
def test_the_curators_part_of_the_readme_runs_as_it_is_written(tmp_path: Path) -> None:
    """Every shell block below the heading, pasted into one shell, with pictures where the text wants them."""
    if not (REPOSITORY / ".venv/bin/activate").is_file():
        pytest.skip("the commands begin with what `make env` makes")
    write_pictures(tmp_path / ".iqpir/pictures", 8)
    part = (REPOSITORY / "README.md").read_text().split("## For data curators\n")[1].split("\n## ")[0]
    scripts = [match[2] for match in _FENCE.finditer(part) if match[1] == "bash"]
    assert len(scripts) == 2
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "IQPIR_"))}
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + "\n".join(scripts)],
        cwd=REPOSITORY,
        env={**inherited, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    commands = [name for script in scripts for name, _ in job_commands(script)]
    assert commands == ["shard", "score", "label", "curate", "report", "verify"] and len(results) == len(commands)
    assert results[0]["success"] == 8 and results[2]["labelled"] == 8 and results[3]["samples"] >= 1
    assert (tmp_path / ".iqpir/report.html").stat().st_size > 10_000
    assert "quality_bin" in done.stdout
