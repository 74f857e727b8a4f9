"""HTTP in front of an object store that fails as networks and stores do, at requests that a test chooses."""

import http.client
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
NOT_FORWARDED = {"expect", "connection", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    """What a test decides by.

    Attributes:
        number: of this request among those that change something (PUT, POST, DELETE), from 1; 0 for others.
        method: such as PUT.
        path: with the query.
        conditional: whether it is a conditional write.
    """

    number: int
    method: str
    path: str
    conditional: bool


Fault = str
"""``slow_down`` 503; ``silent`` no answer; ``cut_request`` the connection ends amid the request's body;
``cut_reply`` amid the reply's; ``lost`` the store has done it, the reply is lost; ``deaf`` the condition is
dropped; ``kill_begun`` and ``kill_made`` SIGKILL the client amid its request, and before it gets the reply."""


@dataclass
class FaultProxy:
    """Forwards to ``endpoint``; ``fault`` says for each request what goes wrong (None: nothing).

    Attributes:
        fault: called for every request, one at a time.
        victim: process that the kills are for.
        served: every request with its fault.
    """

    endpoint: str
    fault: Callable[[Request], Fault | None] = lambda _: None
    victim: int = 0
    served: list[tuple[Request, Fault | None]] = field(default_factory=list)
    changes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "FaultProxy":
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def reset(self, fault: Callable[[Request], Fault | None] = lambda _: None) -> None:
        """Count anew, and fail as told from now on."""
        with self.lock:
            self.fault, self.changes = fault, 0
            self.served.clear()

    @property
    def faults(self) -> int:
        """How many requests have failed since the last reset."""
        return sum(fault is not None for _, fault in self.served)

    def decide(self, method: str, path: str, conditional: bool) -> Fault | None:
        with self.lock:
            if method in ("PUT", "POST", "DELETE"):
                self.changes += 1
            request = Request(self.changes if method in ("PUT", "POST", "DELETE") else 0, method, path, conditional)
            fault = self.fault(request)
            self.served.append((request, fault))
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client is gone
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Nothing: the test knows what it asked for."""

    def forward(self) -> None:
        fault = self.proxy.decide(self.command, self.path, "If-None-Match" in self.headers)
        length = int(self.headers.get("Content-Length", 0))
        if fault in ("cut_request", "kill_begun"):
            self.rfile.read(length // 2)
            return self.hang_up(kill=fault == "kill_begun")
        body = self.rfile.read(length)
        if fault == "silent":
            self.proxy.closing.wait(20)
            return self.hang_up()
        if fault == "slow_down":
            return self.answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        status, headers, reply = self.ask(body, deaf=fault == "deaf")
        if fault in ("lost", "kill_made"):
            return self.hang_up(kill=fault == "kill_made")
        return self.answer(status, headers, reply, cut=fault == "cut_reply")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def ask(self, body: bytes, deaf: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the store says."""
        store = http.client.HTTPConnection(urlsplit(self.proxy.endpoint).netloc, timeout=30)
        store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in NOT_FORWARDED and not (deaf and name.lower() == "if-none-match"):
                store.putheader(name, value)
        store.putheader("Content-Length", str(len(body)))
        store.endheaders(body)
        reply = store.getresponse()
        data = reply.read()
        store.close()
        return reply.status, reply.getheaders(), data

    def answer(self, status: int, headers: list[tuple[str, str]], reply: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        size = str(len(reply))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                size = value
            if name.lower() not in NOT_FORWARDED:
                self.send_header(name, value)
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(reply[: len(reply) // 2] if cut else reply)
        if cut:
            self.hang_up()

    def hang_up(self, kill: bool = False) -> None:
        """End the connection without a word, after the client if it has to die."""
        if kill:
            os.kill(self.proxy.victim, signal.SIGKILL)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
