"""The contract of every job: keys, recipes, flags, one JSON line, exit codes."""

import dataclasses
import errno
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import REQUEST_LIMIT_EXCEEDED, RESOURCE_DOES_NOT_EXIST
from ray.exceptions import ActorDiedError, RayTaskError

from iqpir.errors import IncompleteError, IqpirError, PermanentError, UsageError, VerificationError
from pipeline.command import from_dict, parse, run
from pipeline.score import ScoreConfig
from pipeline.shard import ShardConfig
from pipeline.stage2 import Stage2Training
from tests.source_files import REPOSITORY


@dataclass(frozen=True, kw_only=True)
class Sharpening:
    """How sharp."""

    radius: float = 1.5
    """In pixels."""
    passes: int = 1
    """How often."""


@dataclass(frozen=True, kw_only=True)
class SharpenConfig:
    """What a job of this test is told."""

    input: str
    """Folder."""
    names: list[str] = field(default_factory=lambda: ["a", "b"])
    """Some names."""
    dry_run: bool = True
    """Do nothing."""
    keep_going: bool = False
    """Do not stop."""
    sharpening: Sharpening = field(default_factory=Sharpening)
    """Nested settings."""

    def __post_init__(self) -> None:
        if self.input == "forbidden":
            raise UsageError("input forbidden is not allowed.", "Name another.")


@dataclass(frozen=True)
class SharpenResult:
    """What the last line of stdout holds."""

    sharpened: int
    told: str
    exit_code: int = 0


def sharpened(*argv: str, job: str = "shard") -> SharpenConfig:
    return parse(SharpenConfig, argv, job)


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


class TestKeys:
    def test_an_unknown_flag_names_the_nearest_one(self) -> None:
        with pytest.raises(UsageError, match=r"Unknown key 'dry_rum'. Did you mean dry_run\?"):
            sharpened("--input", "x", "--dry-rum", "true")

    def test_an_unknown_dotted_flag_names_the_nearest_one(self) -> None:
        with pytest.raises(UsageError, match=r"'sharpening.radus'. Did you mean sharpening.radius"):
            sharpened("--input", "x", "--sharpening.radus", "2")

    def test_an_unknown_key_of_a_recipe_names_the_nearest_one(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"'inptu'. Did you mean input\?"):
            sharpened("--config", recipe(tmp_path, "inptu: x"))

    def test_an_unknown_nested_key_of_a_recipe_names_the_nearest_one(self, tmp_path: Path) -> None:
        path = recipe(tmp_path, "shard: {input: x, sharpening: {radus: 2}}")
        with pytest.raises(UsageError, match=r"radus'. Did you mean (sharpening\.)?radius"):
            sharpened("--config", path)

    def test_a_key_like_no_other_lists_them_all(self) -> None:
        with pytest.raises(UsageError, match="Known: dry_run, input, keep_going, names, sharpening"):
            sharpened("--input", "x", "--qqqqqqqq", "1")

    def test_a_missing_key_is_named(self) -> None:
        with pytest.raises(UsageError, match=r"required: input\. See shard --help\."):
            sharpened()

    @pytest.mark.parametrize("value", ["two", "1.5", "[1]"])
    def test_a_value_of_the_wrong_type_is_named_with_its_key(self, value: str) -> None:
        with pytest.raises(UsageError, match=rf"sharpening.passes.*{value.strip('[]')}"):
            sharpened("--input", "x", "--sharpening.passes", value)

    def test_a_value_that_the_configuration_refuses_is_told_in_its_own_words(self) -> None:
        with pytest.raises(UsageError, match=r"^input forbidden is not allowed\. Name another\.$"):
            sharpened("--input", "forbidden")


class TestFlags:
    def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(self, tmp_path: Path) -> None:
        path = recipe(tmp_path, "{input: x, sharpening: {radius: 2.0, passes: 3}}")
        config = sharpened("--config", path, "--sharpening.passes", "4")
        assert config == SharpenConfig(input="x", sharpening=Sharpening(radius=2.0, passes=4))

    def test_a_recipe_after_a_flag_wins(self, tmp_path: Path) -> None:
        assert sharpened("--input", "y", "--config", recipe(tmp_path, "input: x")).input == "x"

    def test_dashes_and_underscores_are_alike(self) -> None:
        assert sharpened("--input", "x", "--dry-run", "false") == sharpened("--input", "x", "--dry_run=false")
        assert sharpened("--input", "x", "--keep-going=true").keep_going

    def test_dashes_in_values_stay(self) -> None:
        assert sharpened("--input", "a-b_c", "--names", "[x-y]") == SharpenConfig(input="a-b_c", names=["x-y"])

    @pytest.mark.parametrize(
        ("arguments", "dry_run", "keep_going"),
        [
            (["--keep-going", "--input", "x"], True, True),
            (["--input", "x", "--keep_going"], True, True),
            (["--no-dry-run", "--input", "x"], False, False),
            (["--input", "x", "--no_dry_run", "--keep-going"], False, True),
            (["--dry_run", "false", "--input", "x", "--keep_going", "true"], False, True),
        ],
    )
    def test_yes_or_no_flags_need_no_value(self, arguments: list[str], dry_run: bool, keep_going: bool) -> None:
        config = sharpened(*arguments)
        assert (config.dry_run, config.keep_going) == (dry_run, keep_going)

    def test_a_flag_that_is_not_yes_or_no_has_no_negative(self) -> None:
        with pytest.raises(UsageError, match="no_input"):
            sharpened("--input", "x", "--no-input")


class TestRecipes:
    def test_a_job_reads_its_section_over_the_shared_one_and_no_other(self, tmp_path: Path) -> None:
        path = recipe(
            tmp_path,
            "all: {input: shared, keep_going: true, corpus: for-others}\n"
            "shard: {keep_going: false}\n"
            "score: {input: others}\n",
        )
        assert sharpened("--config", path) == SharpenConfig(input="shared", keep_going=False)
        assert sharpened("--config", path, job="score") == SharpenConfig(input="others", keep_going=True)
        assert sharpened(f"--config={path}", job="label") == SharpenConfig(input="shared", keep_going=True)

    def test_an_unknown_section_names_the_nearest_one(self, tmp_path: Path) -> None:
        path = recipe(tmp_path, "all: {input: x}\nshrad: {keep_going: true}\n")
        with pytest.raises(UsageError, match=r"unknown section 'shrad'. Did you mean shard"):
            sharpened("--config", path)

    def test_a_flat_recipe_may_hold_a_key_that_is_also_a_job(self, tmp_path: Path) -> None:
        path = recipe(tmp_path, "{corpus: c, view: v, name: n, stage1: runs/one}")
        assert parse(Stage2Training, ["--config", path], "stage2").stage1 == "runs/one"

    def test_a_nested_key_of_the_shared_section_reaches_jobs_that_have_it(self, tmp_path: Path) -> None:
        path = recipe(tmp_path, "all: {sharpening: {radius: 3.0}, scheduling: {workers: 2}}\nshard: {input: x}\n")
        assert sharpened("--config", path).sharpening.radius == 3.0

    def test_variables_are_taken_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IQPIR_TEST_BUCKET", "s3://bucket")
        assert sharpened("--config", recipe(tmp_path, "input: ${IQPIR_TEST_BUCKET}/a")).input == "s3://bucket/a"

    def test_a_variable_that_is_not_set_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("IQPIR_TEST_BUCKET", raising=False)
        with pytest.raises(UsageError, match="needs the environment variable IQPIR_TEST_BUCKET"):
            sharpened("--config", recipe(tmp_path, "input: ${IQPIR_TEST_BUCKET}/a"))

    def test_the_workspace_has_a_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = recipe(tmp_path, "input: ${IQPIR_WORKSPACE}/a")
        monkeypatch.setenv("IQPIR_WORKSPACE", "s3://bucket/work")
        assert sharpened("--config", path).input == "s3://bucket/work/a"
        monkeypatch.delenv("IQPIR_WORKSPACE")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert sharpened("--config", path).input == f"{tmp_path}/.iqpir/a"

    @pytest.mark.parametrize("text", ["[1, 2]", "just words", "{open: "])
    def test_a_file_that_is_no_recipe_is_named(self, tmp_path: Path, text: str) -> None:
        path = recipe(tmp_path, text)
        with pytest.raises(UsageError, match=r"recipe\.yaml is no (mapping|YAML)"):
            sharpened("--config", path)

    @pytest.mark.parametrize("name", ["absent.yaml", "."])
    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="Cannot read the recipe"):
            sharpened("--config", str(tmp_path / name))


class TestPrintedAndCarried:
    def test_what_print_config_prints_is_a_recipe_of_the_same_configuration(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--input", "a: b", "--names", "[x, 'y z']", "--sharpening.radius", "2.5", "--keep-going"]
        with pytest.raises(SystemExit) as ended:
            sharpened(*arguments, "--print_config")
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed)["sharpening"] == {"radius": 2.5, "passes": 1}
        assert sharpened("--config", recipe(tmp_path, printed)) == sharpened(*arguments)

    @pytest.mark.parametrize(
        "config",
        [
            ShardConfig(input="a", corpus="b", min_side=8),
            ScoreConfig(corpus="c", metrics=["rank"], device="cuda"),
            Stage2Training(corpus="c", view="v", name="n", stage1="s", network={"codebook_size": 8}, batch_size=4),
        ],
        ids=lambda config: type(config).__name__,
    )
    def test_a_configuration_survives_its_way_through_json(self, config: ShardConfig | ScoreConfig) -> None:
        assert from_dict(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config

    def test_an_unknown_key_does_not_survive(self) -> None:
        with pytest.raises(UsageError, match=r"Unknown key 'inputs'. Did you mean input"):
            from_dict(SharpenConfig, {"input": "x", "inputs": "y"})


def failing(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a job whose verb raises ``error``."""

    def verb(config: SharpenConfig) -> SharpenResult:
        raise error

    code = run(verb, SharpenConfig, ["--input", "x"], "sharpen")
    return (code, *capsys.readouterr())


class TestEnding:
    def test_the_last_line_of_stdout_is_the_result_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        def verb(config: SharpenConfig) -> SharpenResult:
            return SharpenResult(sharpened=3, told="two\nlines, ümlaut")

        assert run(verb, SharpenConfig, ["--input", "x"], "sharpen") == 0
        told = capsys.readouterr()
        assert json.loads(told.out.splitlines()[-1]) == {"sharpened": 3, "told": "two\nlines, ümlaut", "exit_code": 0}
        assert told.out.endswith("\n") and told.err == ""

    def test_a_result_may_have_an_exit_code_of_its_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        def verb(config: SharpenConfig) -> SharpenResult:
            return SharpenResult(sharpened=3, told="", exit_code=3)

        assert run(verb, SharpenConfig, ["--input", "x"], "sharpen") == 3
        assert json.loads(capsys.readouterr().out)["sharpened"] == 3

    @pytest.mark.parametrize(
        ("error", "code"), [(UsageError, 1), (IncompleteError, 3), (VerificationError, 4), (PermanentError, 5)]
    )
    def test_each_kind_of_error_has_its_exit_code_and_one_line(
        self, error: type[IqpirError], code: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raised = error("It is broken.", "Mend it.", "docs/jobs.md")
        assert failing(raised, capsys) == (code, "", "sharpen: It is broken. Mend it. See docs/jobs.md.\n")

    @pytest.mark.parametrize(
        ("number", "code"),
        [
            (errno.EACCES, 1),
            (errno.ENOTDIR, 1),
            (errno.EISDIR, 1),
            (errno.ENOSPC, 3),
            (errno.ETIMEDOUT, 3),
            (errno.ECONNREFUSED, 3),
        ],
        ids=lambda value: errno.errorcode[value] if value > 5 else "",
    )
    def test_a_failing_disk_or_network_is_one_line_too(
        self, number: int, code: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ended, out, err = failing(OSError(number, "it failed\nbadly", "s3://bucket/a"), capsys)
        assert (ended, out) == (code, "")
        assert err.count("\n") == 1 and "it failed badly" in err and "s3://bucket/a" in err

    def test_an_interrupted_job_may_be_run_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = failing(KeyboardInterrupt(), capsys)
        assert (code, out) == (3, "")
        assert err == "sharpen: interrupted; the same command goes on where it stopped.\n"

    @pytest.mark.parametrize(
        ("error", "code", "told"),
        [
            (MlflowException("API request failed with\ntoo many retries"), 3, "MLflow failed: API request failed with"),
            (MlflowException("busy", REQUEST_LIMIT_EXCEEDED), 3, "MLflow failed: busy. When"),
            (MlflowException("no such run", RESOURCE_DOES_NOT_EXIST), 1, "MLflow refuses: no such run. Look"),
            (ActorDiedError(), 3, "Ray failed: The actor died"),
            (RayTaskError("work", "traceback", OSError(errno.ENOSPC, "full")), 3, "full"),
            (RayTaskError("work", "traceback", UsageError("It is wrong.")), 1, "sharpen: It is wrong.\n"),
        ],
        ids=["away", "busy", "refuses", "ray", "disk of a task", "usage of a task"],
    )
    def test_servers_that_fail_are_one_line_too(
        self, error: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raised = error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
        ended, out, err = failing(raised, capsys)
        assert (ended, out, err.count("\n")) == (code, "", 1)
        assert told in err

    @pytest.mark.parametrize("error", [ZeroDivisionError(), RayTaskError("work", "there", ZeroDivisionError())])
    def test_a_mistake_of_the_program_keeps_its_traceback(
        self, error: Exception, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raised = error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
        code, out, err = failing(raised, capsys)
        assert (code, out) == (5, "")
        assert err.startswith("Traceback") and "raise error" in err and "ZeroDivisionError" in err.splitlines()[-1]

    def test_wrong_usage_runs_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        def verb(config: SharpenConfig) -> SharpenResult:
            raise AssertionError("was run")

        assert run(verb, SharpenConfig, ["--inptu", "x"], "sharpen") == 1
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("sharpen: ") and told.err.count("\n") == 1


@pytest.mark.slow
def test_a_job_leaves_with_its_own_exit_code_right_after_it_has_read_a_table(tmp_path: Path) -> None:
    """Threads of pyarrow that outlive the reading abort an interpreter that ends: 134 instead of 1.

    With them this failed in 6 of 10 processes, hence several; torch makes the end slow enough to be hit.
    """
    script = (
        "import sys, pyarrow as pa\n"
        "import pipeline.score\n"
        "from pipeline.layout import from_parquet, to_parquet\n"
        "assert from_parquet(to_parquet(pa.table({'a': list(range(1000))}))).num_rows == 1000\n"
        "sys.exit(1)"
    )
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
