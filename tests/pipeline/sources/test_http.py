import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from iqpir.errors import UsageError
from pipeline.sources.http import Downloads, HttpConfig, is_public
from pipeline.sources.inputs import TRANSIENT, InputError
from tests.pipeline.sources.conftest import Web


def downloads(max_bytes: int = 10_000, **options: Any) -> Downloads:
    settings = {"allow_private": True, "backoff": 0.01, "timeout": 0.5, **options}
    return Downloads(HttpConfig(**settings), max_bytes)


def code_of(fetch: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        fetch()
    assert caught.value.message
    return caught.value.code


def test_content_and_etag_come(web: Web) -> None:
    web.files["/a"] = b"bytes"
    found = downloads().fetch(f"{web.url}/a")
    assert (found.data, found.etag) == (b"bytes", "v1")


def test_a_busy_server_is_asked_again_until_it_answers(web: Web) -> None:
    web.files["/a"], web.busy["/a"] = b"bytes", (3, 503, "")
    assert downloads().fetch(f"{web.url}/a").data == b"bytes"
    assert web.requests["/a"] == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_stays_busy_is_a_transient_failure(web: Web, status: int) -> None:
    web.busy["/a"] = (99, status, "")
    code = code_of(lambda: downloads(attempts=3).fetch(f"{web.url}/a"))
    assert code == "http_unavailable" and code in TRANSIENT and web.requests["/a"] == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_in_full(web: Web, form: str) -> None:
    after = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    web.files["/a"], web.busy["/a"] = b"bytes", (1, 429, after)
    began = time.monotonic()
    assert downloads().fetch(f"{web.url}/a").data == b"bytes"
    assert time.monotonic() - began > 0.9


def test_a_longer_retry_after_than_allowed_is_not_waited(web: Web) -> None:
    web.busy["/a"] = (1, 503, "3600")
    assert code_of(lambda: downloads().fetch(f"{web.url}/a")) == "http_unavailable"
    assert web.requests["/a"] == 1


def test_what_is_not_there_is_permanent_and_asked_once(web: Web) -> None:
    code = code_of(lambda: downloads().fetch(f"{web.url}/none"))
    assert code == "http_404" and code not in TRANSIENT and web.requests["/none"] == 1


@pytest.mark.parametrize(("path", "code"), [("/silent", "http_timeout"), ("/cut", "http_connection")])
def test_silence_and_cuts_are_transient(web: Web, path: str, code: str) -> None:
    assert code_of(lambda: downloads(attempts=2, timeout=0.2).fetch(web.url + path)) == code
    assert code in TRANSIENT and web.requests[path] == 2


@pytest.mark.parametrize("path", ["/drip", "/loris", "/trickle"])
def test_a_dripping_answer_ends_at_the_deadline(web: Web, path: str) -> None:
    """With a length, in its headers, and without a length, where an end of the connection is the end."""
    began = time.monotonic()
    assert code_of(lambda: downloads(deadline=0.4).fetch(web.url + path)) == "http_timeout"
    assert time.monotonic() - began < 3


def test_a_closed_port_is_transient() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
        assert code_of(lambda: downloads(attempts=2).fetch(url)) == "http_connection"


def test_longer_answers_than_allowed_are_not_read(web: Web) -> None:
    web.files["/long"] = b"x" * 101
    for path in ("/long", "/endless"):
        assert code_of(lambda path=path: downloads(max_bytes=100).fetch(web.url + path)) == "too_large"
    assert downloads(max_bytes=101).fetch(f"{web.url}/long").data == b"x" * 101


def test_redirects_are_followed_and_counted(web: Web) -> None:
    web.files["/end"] = b"bytes"
    web.redirects |= {"/one": "/two", "/two": f"{web.url}/end", "/round": "/round", "/file": "file:///etc/hostname"}
    assert downloads().fetch(f"{web.url}/one").data == b"bytes"
    assert code_of(lambda: downloads().fetch(f"{web.url}/round")) == "http_redirect"
    assert code_of(lambda: downloads().fetch(f"{web.url}/file")) == "http_redirect"


def test_private_addresses_are_refused_without_a_request(web: Web) -> None:
    web.files["/a"] = b"bytes"
    closed = downloads(allow_private=False)
    port = web.server_port
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0.0.0.0"):
        assert code_of(lambda host=host: closed.fetch(f"http://{host}:{port}/a")) == "http_address_refused", host
    assert not web.requests


def resolve_to(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> list[str]:
    """Names of a made-up zone; each question takes the next answer, the last one stays."""
    real, asked = socket.getaddrinfo, []

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name in answers:
            asked.append(name)
            host = answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0]
        return real(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_judged_by_its_address(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, {"pictures.example": ["127.0.0.1"], "metadata.example": ["169.254.169.254"]})
    closed = downloads(allow_private=False)
    for name in ("pictures.example", "metadata.example"):
        url = f"http://{name}:{web.server_port}/a"
        assert code_of(lambda url=url: closed.fetch(url)) == "http_address_refused"
    assert not web.requests


def test_a_name_that_changes_its_answer_gets_no_second_question(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: public when it is judged, private when it is connected to; the judged one is connected to."""
    asked = resolve_to(monkeypatch, {"rebind.example": ["203.0.114.1", "127.0.0.1"]})
    connected: list[Any] = []

    def create_connection(address: Any, *args: Any, **options: Any) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("urllib3.util.connection.create_connection", create_connection)
    url = f"http://rebind.example:{web.server_port}/a"
    assert code_of(lambda: downloads(allow_private=False, attempts=1).fetch(url)) == "http_connection"
    assert connected == [("203.0.114.1", web.server_port)] and asked == ["rebind.example"]
    assert not web.requests


def test_a_redirect_to_a_private_address_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host counts as public for this test, the second one does not."""
    web.files["/a"] = b"bytes"
    web.redirects["/go"] = f"http://localhost:{web.server_port}/a"
    resolve_to(monkeypatch, {"localhost": ["::1"]})
    monkeypatch.setattr("pipeline.sources.http.is_public", lambda address: address == "127.0.0.1")
    closed = downloads(allow_private=False)
    assert closed.fetch(f"{web.url}/a").data == b"bytes"
    assert code_of(lambda: closed.fetch(f"{web.url}/go")) == "http_address_refused"
    assert web.requests == {"/a": 1, "/go": 1}


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)  # fmt: skip
def test_addresses_of_inside_networks_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "203.0.114.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_addresses_of_the_open_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b/", "http://host:99999/x"])
def test_addresses_without_sense_are_permanent_failures(url: str) -> None:
    code = code_of(lambda: downloads(allow_private=False, attempts=1).fetch(url))
    assert code not in TRANSIENT


@pytest.mark.parametrize("options", [{"timeout": 0}, {"attempts": 0}, {"deadline": -1}, {"backoff": -1}])
def test_limits_that_cannot_be_kept_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        HttpConfig(**options)
