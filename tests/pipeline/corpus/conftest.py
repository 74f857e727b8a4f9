"""Stores to run against: a folder, memory, and S3 over real HTTP (moto); one of them deaf to conditions."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from PIL import Image
from werkzeug.serving import BaseWSGIServer, make_server

from pipeline.shard import ShardConfig, ShardResult, shard
from pipeline.storage import Storage

Environ = dict[str, Any]


class Requests:
    """WSGI in front of moto: counts changes and listings, can drop the condition of conditional writes."""

    def __init__(self, app: Callable[[Environ, Any], Iterable[bytes]]) -> None:
        self.app, self.deaf = app, False
        self.puts: list[str] = []
        self.listings: list[str] = []

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            self.puts.append(environ["PATH_INFO"])
        if "list-type" in environ["QUERY_STRING"]:
            self.listings.append(environ["QUERY_STRING"])
        if self.deaf:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        return self.app(environ, start_response)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, Requests]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    requests = Requests(DomainDispatcherApplication(create_backend_app))
    server: BaseWSGIServer = make_server("127.0.0.1", 0, requests, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()


@pytest.fixture
def s3(s3_server: tuple[str, Requests], monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    """Credentials and endpoint of the server in the environment, and a bucket ``pictures``."""
    endpoint, requests = s3_server
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="pictures")
    requests.deaf = False
    requests.puts.clear()
    yield requests
    requests.deaf = False


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "folder":
        return Storage.open(str(tmp_path / "store"))
    if request.param == "memory":
        return Storage.open(f"memory://{uuid.uuid4().hex}/store")
    request.getfixturevalue("s3")
    return Storage.open(f"s3://pictures/{uuid.uuid4().hex}/store")


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Path]:
    """Write pictures of noise to a folder and return it."""

    def make(count: int = 10, folder: str = "input", side: int = 40, first: int = 0) -> Path:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        for number in range(first, first + count):
            noise = np.random.default_rng(number).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path / f"{number:03d}.png")
        return path

    return make


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[..., ShardResult]:
    """Run the verb in small units, in this process."""

    def run(source: Path | str, corpus: str | Path = "", **options: Any) -> ShardResult:
        url = str(corpus or tmp_path / "corpus")
        settings = {"unit_samples": 4, "threads": 2, "workers": 0, **options}
        return shard(ShardConfig(input=str(source), corpus=url, **settings))

    return run
