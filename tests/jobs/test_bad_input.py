"""Bad input ends in one line that says what to do, the right exit code, and nothing half-written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from pipeline.command import run
from pipeline.corpus import Corpus
from pipeline.shard import ShardConfig, shard
from tests.chain import make_data, write_pictures
from tests.jobs.scripts import job
from tests.source_files import REPOSITORY

NOBODY = "http://127.0.0.1:9"
"""The discard port: connections are refused."""


def start(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python jobs/<name>.py arguments`` in a process of its own."""
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def said(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr of a job that left with ``code`` and printed no result."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a job in this process: its one line on stderr, after leaving with code 1 and without a result."""

    def attempt(name: str, *arguments: str | Path) -> str:
        script = job(name)
        capsys.readouterr()
        code = run(script.verb, script.config_type, [str(argument) for argument in arguments], name)
        out, err = capsys.readouterr()
        assert (code, out) == (1, ""), err
        assert err.count("\n") == 1 and err.startswith(f"{name}: "), err
        return err

    return attempt


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed corpus of four pictures without scores."""
    folder = tmp_path_factory.mktemp("sealed")
    shard(ShardConfig(input=str(write_pictures(folder / "pictures", 4)), corpus=str(folder / "corpus"), workers=0))
    return folder / "corpus"


def spoil(folder: Path) -> Path:
    """Four files that are no pictures, each in another way."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    (folder / "whole.png").unlink()
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.webp").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "small.png")
    return folder


class TestShard:
    def test_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        line = said(start("shard", "--input", tmp_path / "empty", "--corpus", tmp_path / "corpus"), 1)
        assert f"{tmp_path}/empty is empty" in line and "--input" in line
        assert not (tmp_path / "corpus").exists()

    def test_a_folder_without_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts/a.txt").write_text("a")
        line = said(start("shard", "--input", tmp_path / "texts", "--corpus", tmp_path / "corpus"), 1)
        assert ".png" in line
        assert not (tmp_path / "corpus").exists()

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        line = said(start("shard", "--input", tmp_path / "absent", "--corpus", tmp_path / "corpus"), 1)
        assert f"{tmp_path}/absent does not exist" in line and "--input" in line
        assert not (tmp_path / "corpus").exists()

    def test_a_file_in_place_of_a_folder(self, tmp_path: Path) -> None:
        pictures = write_pictures(tmp_path / "pictures", 1)
        line = said(start("shard", "--input", pictures / "00.png", "--corpus", tmp_path / "corpus"), 1)
        assert "is a file" in line and "folder" in line
        assert not (tmp_path / "corpus").exists()

    def test_a_corpus_where_none_can_be(self, tmp_path: Path) -> None:
        pictures = write_pictures(tmp_path / "pictures", 1)
        line = said(start("shard", "--input", pictures, "--corpus", pictures / "00.png/corpus"), 1)
        assert "00.png" in line and "Check the path" in line

    def test_only_corrupt_files(self, tmp_path: Path) -> None:
        spoil(tmp_path / "spoilt")
        line = said(start("shard", "--input", tmp_path / "spoilt", "--corpus", tmp_path / "corpus"), 5)
        assert "None of the 4 inputs" in line and "failed_not_an_image" in line and "rejected_" in line
        assert not (tmp_path / "corpus/_SUCCESS").exists() and not list(tmp_path.glob("corpus/_manifest/*"))
        assert not list(tmp_path.glob("corpus/shards/*"))

    def test_only_corrupt_files_make_no_corpus_for_the_next_job(
        self, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--input", str(spoil(tmp_path / "spoilt")), "--corpus", str(tmp_path / "corpus")]
        assert run(shard, ShardConfig, arguments, "shard") == 5
        assert "jobs/shard.py" in refused("score", "--corpus", tmp_path / "corpus")
        write_pictures(tmp_path / "spoilt", 2)
        assert run(shard, ShardConfig, arguments, "shard") == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["success"] == 2


WITH_CORPUS = {
    "score": [],
    "label": [],
    "curate": ["--name", "v"],
    "report": ["--view", "v", "--output", "report.html"],
    "explore": ["--port", "0"],
    "verify": [],
    "gc": [],
    "status": [],
    "degrade": ["--view", "v", "--output", "pairs"],
    "export": ["--view", "v", "--size", "32", "--output", "train.beton"],
    "encode": ["--stage1", "run"],
    "stage1": ["--view", "v", "--name", "n", "--runs", "runs"],
    "stage2": ["--view", "v", "--name", "n", "--runs", "runs", "--stage1", "run"],
    "stage3": ["--view", "v", "--name", "n", "--runs", "runs", "--stage2", "run"],
    "evaluate": ["--view", "v", "--checkpoint", "run"],
}


class TestCorpus:
    @pytest.mark.parametrize("name", WITH_CORPUS)
    def test_a_missing_corpus_is_named(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        line = refused(name, "--corpus", tmp_path / "absent", *WITH_CORPUS[name])
        assert f"{tmp_path}/absent" in line and ("jobs/shard.py" in line or "Check --corpus" in line)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", sorted(WITH_CORPUS.keys() - {"score", "verify", "gc", "status"}))
    def test_what_has_not_been_made_yet_is_named_with_the_job_that_makes_it(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: Path, refused: Callable[..., str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before = sorted(sealed.rglob("*"))
        line = refused(name, "--corpus", sealed, *WITH_CORPUS[name])
        assert any(hint in line for hint in ("jobs/score.py", "jobs/label.py", "jobs/curate.py", "Train first"))
        assert not list(tmp_path.iterdir()) and sorted(sealed.rglob("*")) == before


class TestMetrics:
    def test_an_unknown_metric_names_the_nearest_ones(self, sealed: Path, refused: Callable[..., str]) -> None:
        line = refused("score", "--corpus", sealed, "--metrics", "[rank,niqee]")
        assert "Unknown metric 'niqee'. Did you mean niqe" in line
        assert not (sealed / "scores").exists()

    def test_a_metric_whose_weights_are_absent_names_the_file(
        self, sealed: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        line = refused("score", "--corpus", sealed, "--metrics", "[rank,musiq]", "--weights-uri", tmp_path / "mirror")
        assert "musiq" in line and ".pth" in line and "SHA256SUMS" in line
        assert not (sealed / "scores").exists()

    def test_a_metric_that_may_not_be_used_is_refused(self, sealed: Path, refused: Callable[..., str]) -> None:
        line = refused("score", "--corpus", sealed, "--commercial-safe")
        assert "commercial_safe refuses piqe" in line and "rank" in line
        assert not (sealed / "scores").exists()

    def test_a_labelling_of_a_metric_that_was_not_run(self, sealed: Path, refused: Callable[..., str]) -> None:
        assert "no scores of 'rank'. Run jobs/score.py first" in refused(
            "label", "--corpus", sealed, "--metrics", "[rank]"
        )
        assert not (sealed / "labels").exists() and not (sealed / "calibrations").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("shard", ["--input", "s3://bucket/pictures", "--corpus", "corpus"]),
        ("shard", ["--input", "pictures", "--corpus", "s3://bucket/corpus"]),
        ("score", ["--corpus", "s3://bucket/corpus"]),
    ],
    ids=["input", "corpus", "later job"],
)
def test_an_object_store_that_does_not_answer(name: str, arguments: list[str], tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 1)
    placed = [str(tmp_path / value) if value in ("corpus", "pictures") else value for value in arguments]
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    line = said(start(name, *placed, AWS_ENDPOINT_URL=NOBODY, **keys), 1)
    assert "Cannot reach s3://bucket/" in line and "AWS_ENDPOINT_URL" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


class TestTracking:
    """An MLflow server that does not answer, while nothing else is wrong."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("promote", []),
            ("restore", ["--model", "models:/iqpir@champion"]),
            ("restore", ["--model", "models:/iqpir/1"]),
        ],
        ids=["promote", "alias", "version"],
    )
    def test_a_job_that_needs_the_registry_says_so_within_seconds(
        self, name: str, arguments: list[str], tmp_path: Path
    ) -> None:
        if name == "restore":
            arguments = [
                *arguments,
                "--input",
                str(write_pictures(tmp_path / "in", 1)),
                "--output",
                str(tmp_path / "out"),
            ]
        line = said(start(name, *arguments, MLFLOW_TRACKING_URI=NOBODY), 1)
        assert f"MLflow at {NOBODY} cannot be used" in line and "MLFLOW_TRACKING_URI" in line
        assert not (tmp_path / "out").exists() and not (tmp_path / "iqpir-workspace").exists()

    def test_a_training_takes_no_name_before_the_server_answers(
        self, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        pictures = write_pictures(tmp_path / "pictures", 6)
        data = make_data(pictures, str(tmp_path / "corpus"), str(tmp_path / "runs"), NOBODY)
        line = refused(
            *("stage1", "--corpus", data.corpus, "--view", data.view, "--preset", "tiny32", "--perceptual", "ssim"),
            *("--name", "n", "--runs", data.runs, "--tracking-uri", NOBODY, "--batch-size", "4"),
        )
        assert f"MLflow at {NOBODY} cannot be used" in line
        assert not (tmp_path / "runs").exists()

    def test_a_folder_is_no_server(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert "sqlite:///" in refused("promote", "--tracking-uri", tmp_path)


class TestModels:
    def test_a_checkpoint_that_is_not_there(self, refused: Callable[..., str], tmp_path: Path) -> None:
        pictures = write_pictures(tmp_path / "pictures", 1)
        missing = ["--model", tmp_path / "absent", "--input", pictures, "--output", tmp_path / "out"]
        assert "holds no finished checkpoint" in refused("restore", *missing)
        assert "holds no finished checkpoint" in refused("register", "--checkpoint", tmp_path / "absent")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]

    def test_nothing_to_restore(self, refused: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        arguments = ["--model", tmp_path / "absent", "--input", tmp_path / "empty", "--output", tmp_path / "out"]
        assert f"no pictures below {tmp_path}/empty" in refused("restore", *arguments)
        assert not (tmp_path / "out").exists()

    def test_an_unknown_key(self, refused: Callable[..., str]) -> None:
        assert "'qualty'. Did you mean quality?" in refused("restore", "--model", "m", "--qualty", "1")

    def test_a_dial_beyond_its_ends(self, refused: Callable[..., str]) -> None:
        line = refused("restore", "--model", "m", "--input", "i", "--output", "o", "--quality", "1.5")
        assert "quality 1.5 is outside [0, 1]" in line


def test_a_few_corrupt_files_are_rows_with_a_reason_and_the_chain_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "pictures", 6)
    spoil(tmp_path / "pictures/spoilt")
    corpus = tmp_path / "corpus"
    results = {}
    for name, arguments in {
        "shard": ["--input", str(tmp_path / "pictures")],
        "score": ["--metrics", "[rank]"],
        "label": ["--metrics", "[rank]"],
        "curate": ["--name", "all", "--holdout", "0.2"],
        "verify": [],
    }.items():
        script = job(name)
        code = run(script.verb, script.config_type, ["--corpus", str(corpus), *arguments], name)
        told = capsys.readouterr()
        assert code == 0, told.err
        results[name] = json.loads(told.out.splitlines()[-1])
    assert {key: results["shard"][key] for key in ("inputs", "success", "failed", "rejected")} == {
        "inputs": 10,
        "success": 6,
        "failed": 3,
        "rejected": 1,
    }
    assert results["score"]["metrics"]["rank"]["scored"] == results["label"]["labelled"] == 6
    assert results["curate"]["train"] + results["curate"]["val"] == 6
    opened = Corpus(str(corpus))
    rows = opened.rows(opened.manifest().units[0])
    unsound = rows.filter(pc.not_equal(rows["status"], "success")).to_pylist()
    assert {row["relpath"]: row["status"] for row in unsound} == {
        "spoilt/cut.png": "failed_truncated",
        "spoilt/empty.webp": "failed_empty",
        "spoilt/small.png": "rejected_too_small",
        "spoilt/text.jpg": "failed_not_an_image",
    }
    assert all(row["error_code"] and row["error_message"] for row in unsound)
