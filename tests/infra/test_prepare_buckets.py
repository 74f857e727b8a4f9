"""The bucket script on real HTTP stores: one that keeps `If-None-Match`, one that ignores it, none at all."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.infra.strict_schema import ROOT

SCRIPT = ROOT / "infra" / "storage" / "prepare_buckets.py"


def run(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-must-not-be-shown",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class ForgetfulStore(BaseHTTPRequestHandler):
    """Answers PUT, GET and DELETE as a store does that has never heard of conditions."""

    objects: ClassVar[dict[str, bytes]] = {}

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # With a checksum at the end the client frames the content; the frame does not matter for this test.
        self.objects[self.path] = b"second" if b"second" in body else b"first" if b"first" in body else body
        self.answer(200)

    def do_GET(self) -> None:
        self.answer(200, self.objects[self.path])

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self.answer(204)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 (the base class names it so)
        """Say nothing."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_buckets_are_made_once_with_a_rule_against_abandoned_uploads(store: str) -> None:
    for _ in range(2):
        done = run(store, "iqpir", "mlflow", "--days", "3")
        assert done.returncode == 0, done.stderr
        assert "secret" not in done.stderr
    client: Any = boto3.client(
        "s3",
        endpoint_url=store,
        aws_access_key_id="key",
        aws_secret_access_key="any",
        region_name="us-east-1",
    )
    assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} >= {"iqpir", "mlflow"}
    for bucket in ("iqpir", "mlflow"):
        (rule,) = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
        assert rule["Status"] == "Enabled"
        assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 3}
        assert "Expiration" not in rule, "no rule may ever delete what was committed"
        assert "Contents" not in client.list_objects_v2(Bucket=bucket), "the probe is cleared away"


@pytest.mark.slow
def test_a_store_that_ignores_conditions_is_refused() -> None:
    with serving(ForgetfulStore) as endpoint:
        done = run(endpoint, "iqpir")
    assert done.returncode == 4, done.stderr
    assert "If-None-Match" in done.stderr


@pytest.mark.slow
def test_an_unreachable_store_is_one_clear_line() -> None:
    with serving(ForgetfulStore) as endpoint:
        pass
    done = run(endpoint, "iqpir")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert endpoint in done.stderr
