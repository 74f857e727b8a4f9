"""What a test does to a process before its job begins; imports little, for it is imported there."""

import ctypes
import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from iqpir.errors import IncompleteError
from pipeline.shard import ShardConfig, shard
from pipeline.storage import Storage
from tests.chaos.dies_at import DiesAt
from tests.chaos.invariants import Files, require_finished, require_whole

PART = 5 << 20
"""The least that S3 takes as a part of an upload."""
CLONE_NEWNS = 0x00020000
NOT_PERMITTED = 77


@dataclass(frozen=True)
class SmallDisk:
    """Gives the process a disk of its own at ``folder``: a tmpfs that ends with it."""

    folder: Path
    size: str

    def __call__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.folder)]
        private = ["mount", "--make-rprivate", "/"]
        if libc.unshare(CLONE_NEWNS) or any(subprocess.run(args, check=False).returncode for args in (private, mount)):
            os._exit(NOT_PERMITTED)
        without_patience()


def without_patience() -> None:
    """A unit is tried as often as ever, at once."""
    time.sleep = lambda _: None


def files_of_one_block() -> None:
    """No file may exceed 8 KiB: what a quota does, and no root is needed."""
    without_patience()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@dataclass(frozen=True)
class FillAndGrow:
    """Run out of space on the disk of the corpus, then have more, in one process: the disk is its own."""

    expected: Files
    grown: str = "size=4m"

    def __call__(self, config: ShardConfig) -> None:
        corpus = Storage.open(config.corpus)
        with pytest.raises((IncompleteError, OSError), match=os.strerror(errno.ENOSPC)):
            shard(config)
        left = require_whole(corpus)
        assert "_SUCCESS" not in left and corpus.unfinished() == []
        subprocess.run(["mount", "-o", f"remount,{self.grown}", config.corpus], check=True)
        shard(config)
        require_finished(corpus, self.expected)


@dataclass(frozen=True)
class Both:
    """A sabotage, then a death; travels to the process that both are for."""

    sabotage: Callable[[], None]
    death: DiesAt

    def __call__(self) -> None:
        self.sabotage()
        self.death()


def small_parts() -> None:
    """Objects of 10 MB go up in parts, which otherwise those of 100 MB do."""
    import s3fs.core

    s3fs.core.calculate_chunksize = lambda *_, **__: PART
