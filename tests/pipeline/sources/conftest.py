"""A web server that misbehaves as real ones do, and corpora made from every kind of source."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iqpir.pixels import encode_png
from pipeline.shard import ShardConfig, ShardResult, shard
from tests.conftest import draw_picture


class Web(ThreadingHTTPServer):
    """Answers by path; ``requests`` counts them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.busy: dict[str, tuple[int, int, str]] = {}
        """Path -> how many requests are refused, with which status and Retry-After."""
        self.redirects: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        web, path = self.server, self.path
        web.requests[path] += 1
        count, status, after = web.busy.get(path, (0, 0, ""))
        special = {
            "/silent": self.silent,
            "/cut": self.cut,
            "/drip": self.drip,
            "/loris": self.loris,
            "/trickle": self.trickle,
            "/endless": self.endless,
        }
        if web.requests[path] <= count:
            self.answer(status, b"", **({"Retry-After": after} if after else {}))
        elif path in web.redirects:
            self.answer(302, b"", Location=web.redirects[path])
        elif path in web.files:
            self.answer(200, web.files[path], ETag='"v1"')
        elif path in special:
            self.close_connection = True
            special[path]()
        else:
            self.answer(404, b"nothing")

    def silent(self) -> None:
        self.server.stop.wait(20)

    def cut(self) -> None:
        self.answer(200, b"x" * 50, length=100)

    def drip(self) -> None:
        self.answer(200, b"", length=1000)
        while not self.server.stop.wait(0.05) and self.sent(b"x"):
            continue

    def loris(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.stop.wait(0.05) and self.sent(b"x"):
            continue

    def trickle(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.stop.wait(0.05) and self.sent(b"x"):
            continue

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while self.sent(b"x" * 65536):
            continue

    def sent(self, data: bytes) -> bool:
        try:
            self.wfile.write(data)
        except OSError:
            return False
        return True

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Six PNGs of 40 x 40."""
    return [encode_png(draw_picture(seed, 40)) for seed in range(6)]


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[..., ShardResult]:
    def run(location: Path | str, **options: Any) -> ShardResult:
        settings = {"corpus": str(tmp_path / "corpus"), "unit_samples": 4, "threads": 2, "workers": 0, **options}
        return shard(ShardConfig(input=str(location), **settings))

    return run
