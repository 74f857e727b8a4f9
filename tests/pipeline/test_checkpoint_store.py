"""Checkpoints at a URL: attempts are told apart, and no copy of a remote one outlives its process."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from pipeline.storage import Storage
from pipeline.training.checkpoints import CheckpointStore


def test_attempts_that_run_at_once_have_numbers_of_their_own(tmp_path: Path) -> None:
    stores = [CheckpointStore(Storage.open(str(tmp_path)), keep=2) for _ in range(8)]
    together = Barrier(len(stores))

    def claim(store: CheckpointStore) -> int:
        together.wait()
        return store.attempt

    with ThreadPoolExecutor(len(stores)) as pool:
        assert sorted(pool.map(claim, stores)) == list(range(1, 9))
    assert CheckpointStore(Storage.open(str(tmp_path)), keep=2).attempt == 9


def test_no_copy_of_a_remote_checkpoint_outlives_its_process(tmp_path: Path) -> None:
    program = """
        import tempfile
        from pathlib import Path
        from iqpir.training.checkpoint import write_manifest
        from pipeline.training.checkpoints import CheckpointStore, fetch_checkpoint
        from pipeline.storage import Storage

        made = Path("made")
        made.mkdir()
        (made / "weights").write_bytes(b"1")
        write_manifest(made, {"step": 1})
        CheckpointStore(Storage.open("memory://runs/a/checkpoints"), 1).save(made, 1)
        copy = fetch_checkpoint("memory://runs/a")
        assert (copy / "weights").read_bytes() == b"1" and Path(tempfile.gettempdir()) in copy.parents
        fetch_checkpoint("memory://runs/none")
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UsageError: memory://runs/none holds no finished checkpoint" in done.stderr.splitlines()[-1].replace(
        "iqpir.errors.", ""
    ), done.stderr
    assert list(scratch.iterdir()) == []
