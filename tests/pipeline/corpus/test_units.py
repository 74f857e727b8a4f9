import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from iqpir.errors import IncompleteError, PermanentError, UsageError, VerificationError
from pipeline.commits.records import commit, finished
from pipeline.commits.units import SchedulingConfig, run_units, schedule, uses_ray
from pipeline.storage import Storage


@dataclass(frozen=True)
class Piece:
    unit_id: str
    ordinal: int


PIECES = [Piece(f"{number:032x}", number) for number in range(6)]
HERE = SchedulingConfig(workers=0, attempts=2)


@dataclass(frozen=True)
class Note:
    """Leaves a line a call, fails as told, and as often as told."""

    log: str
    error: type[BaseException] = OSError
    failing: tuple[int, ...] = ()
    times: int = 10**6

    def __call__(self, piece: Piece) -> dict[str, int]:
        calls = Path(self.log).read_text().split() if Path(self.log).exists() else []
        with Path(self.log).open("a") as file:
            file.write(f"{piece.ordinal} ")
        logging.getLogger("notes").warning("a line was left")
        if piece.ordinal in self.failing and calls.count(str(piece.ordinal)) < self.times:
            raise self.error("told to")
        return {"ordinal": piece.ordinal}


def test_each_unit_is_committed_once_and_skipped_afterwards(store: Storage, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    first = run_units(store, "score/m", "f", PIECES, Note(log), total=6, scheduling=HERE)
    again = run_units(store, "score/m", "f", iter(PIECES), Note(log), total=6, scheduling=HERE)
    assert (first.done, first.skipped, again.done, again.skipped) == (6, 0, 0, 6)
    assert Path(log).read_text().split() == [str(number) for number in range(6)]
    records = finished(store, "score/m", "f")
    assert set(records) == {piece.unit_id for piece in PIECES}
    assert {record["ordinal"] for record in records.load(records).values()} == set(range(6))
    assert len(finished(store, "score/m", "other")) == 0


def test_a_storage_failure_is_tried_again(store: Storage, tmp_path: Path) -> None:
    work = Note(str(tmp_path / "log"), failing=(2,), times=1)
    report = run_units(store, "s", "f", PIECES, work, total=6, scheduling=HERE)
    assert report.complete and not report.failures


@pytest.mark.parametrize(
    ("error", "raised", "attempts"), [(OSError, IncompleteError, 2), (UsageError, PermanentError, 1)]
)
def test_what_keeps_failing_is_told_and_the_rest_is_done(
    error: type[Exception], raised: type[Exception], attempts: int, store: Storage, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    work = Note(str(log), error=error, failing=(1, 4))
    report = run_units(store, "s", "f", PIECES, work, total=6, scheduling=HERE)
    assert (report.done, [failure.ordinal for failure in report.failures]) == (4, [1, 4])
    assert log.read_text().split().count("4") == attempts
    with pytest.raises(raised, match=r"2 of 6 units of s are not done\. First: unit 000001"):
        report.require_complete("s")


def test_a_bug_ends_the_run_with_its_traceback(store: Storage, tmp_path: Path) -> None:
    work = Note(str(tmp_path / "log"), error=ZeroDivisionError, failing=(1,))
    with pytest.raises(ZeroDivisionError):
        run_units(store, "s", "f", PIECES, work, total=6, scheduling=HERE)
    assert len(finished(store, "s", "f")) == 1


def test_the_first_record_wins_and_the_second_attempt_adopts_it(store: Storage) -> None:
    first = commit(store, "s", "f", "u", {"value": 1})
    assert commit(store, "s", "f", "u", {"value": 2}) == first
    assert finished(store, "s", "f")["u"]["value"] == 1


def test_a_record_of_another_unit_is_no_record(store: Storage) -> None:
    commit(store, "s", "f", "u", {"value": 1})
    store.publish("_commits/s/f/v.json", store.read("_commits/s/f/u.json"))
    with pytest.raises(VerificationError, match="another unit"):
        finished(store, "s", "f")["v"]


def test_without_conditions_every_reader_takes_the_same_attempt(s3: object, tmp_path: Path) -> None:
    s3.deaf = True  # type: ignore[attr-defined]
    storage = Storage.open("s3://pictures/attempts")
    won = [commit(storage, "s", "f", "u", {"value": value}) for value in (1, 2, 3, 1)]
    assert len(storage.list("_commits")) == 3
    assert finished(storage, "s", "f")["u"] == won[-1]


@pytest.mark.slow
def test_on_ray_errors_and_warnings_are_values_and_bugs_are_not(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    store = Storage.open(str(tmp_path / "store"))
    two = SchedulingConfig(workers=2, attempts=1)
    work = Note(str(tmp_path / "log"), failing=(3,))
    report = run_units(store, "s", "f", PIECES, work, total=6, scheduling=two)
    assert (report.done, [(f.ordinal, f.kind) for f in report.failures]) == (5, [(3, "transient")])
    assert [record.getMessage() for record in caplog.records if "line" in record.getMessage()] == [
        "worker: notes: a line was left"  # once, however many units said it
    ]
    with pytest.raises(ZeroDivisionError):
        bug = Note(str(tmp_path / "log2"), error=ZeroDivisionError, failing=(3,))
        list(schedule(PIECES, bug, 6, "bug", two))


@dataclass(frozen=True)
class Dying:
    """Kills its own process the first ``times`` it is called."""

    folder: str
    times: int

    def __call__(self, piece: Piece) -> int:
        before = len(list(Path(self.folder).iterdir()))
        if before < self.times:
            (Path(self.folder) / f"{before}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return piece.ordinal


@pytest.mark.slow
@pytest.mark.parametrize(("times", "kind"), [(2, ""), (100, "transient")])
def test_on_ray_a_worker_may_die_a_few_times(times: int, kind: str, tmp_path: Path, local_ray: None) -> None:
    two = SchedulingConfig(workers=2)
    ((_, outcome),) = schedule(PIECES[:1], Dying(str(tmp_path), times), 1, "dying", two)
    assert outcome.kind == kind
    assert len(list(tmp_path.iterdir())) == min(times, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers", "units"), [(signal.SIGTERM, 0, 200), (signal.SIGINT, 0, 200), (signal.SIGTERM, 2, 1000)]
)
def test_after_a_signal_the_running_unit_ends_and_exit_is_3(
    number: signal.Signals, workers: int, units: int, draw: Callable[..., Path], tmp_path: Path
) -> None:
    source = draw(units)
    program = textwrap.dedent(
        """
        import sys
        from pipeline.command import command
        from pipeline.shard import ShardConfig, shard
        command(shard, ShardConfig, sys.argv[1:])
        """
    )
    corpus = tmp_path / "corpus"
    arguments = ["--input", str(source), "--corpus", str(corpus), "--unit_samples", "1"]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--workers", str(workers)], cwd=root, stderr=subprocess.PIPE
    )
    while not list(corpus.glob("_commits/shard/*/*.json")) and process.poll() is None:
        pass
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 3, text.decode()
    assert b"units of shard are not done" in text
    records = list(corpus.glob("_commits/shard/*/*.json"))
    assert 0 < len(records) < units and not (corpus / "_SUCCESS").exists()
    assert all(json.loads(path.read_bytes())["inputs"] == 1 for path in records)


def test_ray_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert uses_ray(1) and uses_ray(2) and not uses_ray(0)
    monkeypatch.delenv("RAY_ADDRESS")
    assert uses_ray(2) and not uses_ray(0)


@pytest.mark.parametrize("options", [{"workers": -1}, {"attempts": 0}, {"gpus": -1.0}])
def test_impossible_scheduling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="none may be negative"):
        SchedulingConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "http://127.0.0.1:8265"])
def test_a_cluster_that_does_not_answer_is_a_usage_error(address: str, tmp_path: Path) -> None:
    program = "from pipeline.cluster import ensure_ray; ensure_ray()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "UsageError" in done.stderr and f"No Ray cluster answers at RAY_ADDRESS={address}" in done.stderr
