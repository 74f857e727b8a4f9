"""Each job's help, and that a script runs under its own name."""

import dataclasses
import subprocess
import sys

import pytest

from pipeline.command import JOBS, run
from tests.jobs.scripts import job
from tests.source_files import REPOSITORY


@pytest.mark.parametrize("name", JOBS)
def test_help_opens_with_the_scripts_docstring_and_explains_each_flag(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = job(name)
    with pytest.raises(SystemExit) as ended:
        run(script.verb, script.config_type, ["--help"], name, script.docstring)
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for line in script.docstring.splitlines():
        assert line in told.splitlines()
    flags = {word.strip(",") for line in told.splitlines() if line.startswith("  -") for word in line.split()[:2]}
    fields = {f"--{field.name}" for field in dataclasses.fields(script.config_type)}
    assert flags >= {"--help", "--config", "--print_config", *fields}


@pytest.mark.parametrize("start", [[sys.executable, "jobs/shard.py"], ["jobs/shard.py"]], ids=["python", "executable"])
def test_a_script_runs_by_itself(start: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python jobs/shard.py`` and as ``jobs/shard.py``: a cluster takes either as its entry point."""
    monkeypatch.setenv("PATH", str(REPOSITORY / ".venv/bin"), prepend=":")
    done = subprocess.run([*start, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert job("shard").docstring.splitlines()[0] in done.stdout.splitlines()
    assert done.stdout.startswith("usage: shard ")


def test_a_job_started_wrongly_says_so_in_one_line_and_leaves_with_1() -> None:
    done = subprocess.run(
        [sys.executable, "jobs/shard.py", "--input", "x", "--corpsu", "y"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shard: Unknown key 'corpsu'. Did you mean corpus") and done.stderr.count("\n") == 1
