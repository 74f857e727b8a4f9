"""Small inputs, and the corpus that an uninterrupted run in one process makes of them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.shard import ShardConfig, ShardResult, shard
from pipeline.storage import Storage
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.invariants import Files, files
from tests.chaos.processes import Job, start
from tests.pipeline.corpus.conftest import Requests
from tests.pipeline.corpus.conftest import s3 as s3
from tests.pipeline.corpus.conftest import s3_server as s3_server

SETTINGS: dict[str, Any] = {"unit_samples": 4, "threads": 1, "workers": 0}
Sharding = Callable[..., Job]
MEMORY = Path("/dev/shm")
"""Where a flush to the disk costs nothing, on Linux."""


@dataclass(frozen=True)
class Quiet:
    """Inputs, and what an uninterrupted run made of them."""

    source: Path
    expected: Files


def draw(folder: Path, count: int, first: int = 0, side: int = 40) -> Path:
    """Pictures of noise."""
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        noise = np.random.default_rng(number).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory if possible."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="iqpir-chaos-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    """Six pictures and one that is none, in two units."""
    root = tmp_path_factory.mktemp("quiet")
    source = draw(root / "input", 6)
    (source / "broken.png").write_bytes((source / "000.png").read_bytes()[:99])
    corpus = Storage.open(str(root / "corpus"))
    finish(source, corpus)
    return Quiet(source, files(corpus))


def settings(source: Path | str, corpus: Storage, **options: Any) -> ShardConfig:
    """Of jobs/shard.py, in small units."""
    return ShardConfig(input=str(source), corpus=corpus.url, **{**SETTINGS, **options})


def finish(source: Path | str, corpus: Storage, **options: Any) -> ShardResult:
    """Run jobs/shard.py in this process, undisturbed."""
    return shard(settings(source, corpus, **options))


@pytest.fixture
def sharding(tmp_path: Path) -> Sharding:
    """Start jobs/shard.py in a process of its own."""

    def run(source: Path | str, corpus: Storage, **options: Any) -> Job:
        errors = tmp_path / f"errors-{len(list(tmp_path.glob('errors-*')))}"
        here = {name: options.pop(name) for name in ("prelude", "environment") if name in options}
        return start(shard, settings(source, corpus, **options), errors, **here)

    return run


@pytest.fixture
def proxy(s3: Requests, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The S3 server behind a proxy that can misbehave; the environment points to the proxy."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        yield faulty
