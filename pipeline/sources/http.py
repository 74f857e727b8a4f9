"""Download over http(s): bounded in bytes and time, patient with busy servers, closed to private networks.

A list may come from strangers. Every address that a name resolves to is judged before a connection is made, and
the connection goes to the judged address: redirects and names that change their answer (DNS rebinding) lead nowhere
else. Proxies of the environment are not used, they would resolve names themselves.
"""

import contextlib
import ipaddress
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin

import urllib3
from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, LocationValueError, NewConnectionError, SSLError
from urllib3.exceptions import TimeoutError as SlowError

from iqpir.errors import UsageError
from pipeline.sources.inputs import Fetched, InputError

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_PIECE = 1 << 16
_AGENT = "iqpir"


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """How inputs with an http(s) address are downloaded; ``--pixels.max_bytes`` limits their size."""

    timeout: float = 20.0
    """Seconds without a connection or a piece of the answer."""
    deadline: float = 300.0
    """Seconds that one input may take, further attempts and waits included."""
    attempts: int = 4
    """Requests for one input while its server is busy or away."""
    backoff: float = 1.0
    """Longest wait in seconds before the second attempt, doubled for each further one; a random part of it is waited.
    A Retry-After of the server is waited in full instead."""
    longest_wait: float = 60.0
    """Waits longer than this many seconds are not waited: the input fails."""
    redirects: int = 5
    """Redirects that are followed."""
    allow_private: bool = False
    """Whether private, loopback and link-local addresses may be asked."""

    def __post_init__(self) -> None:
        if min(self.timeout, self.deadline) <= 0 or self.attempts < 1:
            raise UsageError(
                f"http timeout {self.timeout}, deadline {self.deadline} and attempts {self.attempts} must be positive."
            )
        if min(self.backoff, self.longest_wait, self.redirects) < 0:
            raise UsageError(
                f"http backoff {self.backoff}, longest_wait {self.longest_wait} and redirects {self.redirects} "
                "cannot be negative."
            )


class AddressRefusedError(Exception):
    """A name resolves to an address that may not be asked."""


class _BusyError(Exception):
    """Worth another attempt, not before ``wait`` seconds have passed (None: as the configuration says)."""

    def __init__(self, code: str, message: str, wait: float | None = None) -> None:
        self.code, self.message, self.wait = code, message, wait
        super().__init__(message)


class Downloads:
    """Fetches addresses; safe to use from several threads.

    Args:
        config: limits.
        max_bytes: longest answer.
    """

    def __init__(self, config: HttpConfig, max_bytes: int) -> None:
        self._config, self._max_bytes = config, max_bytes
        self._pools = urllib3.PoolManager(num_pools=64, maxsize=16)
        if config.allow_private:
            self._pools.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        else:
            self._pools.pool_classes_by_scheme = {"http": _PublicHTTPPool, "https": _PublicHTTPSPool}

    def fetch(self, url: str) -> Fetched:
        """The content of ``url`` and its etag.

        Raises:
            InputError: there is none to be had; ``inputs.TRANSIENT`` has the codes that may change.
        """
        deadline = time.monotonic() + self._config.deadline
        attempt = 1
        while True:
            try:
                return self._follow(url, deadline)
            except _BusyError as error:
                if time.monotonic() >= deadline:
                    raise InputError("http_timeout", f"{url} took more than {self._config.deadline:g} s.") from error
                wait = self._wait(error, attempt)
                late = time.monotonic() + wait > deadline
                if attempt == self._config.attempts or wait > self._config.longest_wait or late:
                    raise InputError(error.code, error.message) from error
            time.sleep(wait)
            attempt += 1

    def close(self) -> None:
        """Close idle connections."""
        self._pools.clear()

    def _wait(self, error: _BusyError, attempt: int) -> float:
        if error.wait is not None:
            return error.wait + random.uniform(0, self._config.backoff)
        return random.uniform(0, self._config.backoff * 2.0 ** (attempt - 1))

    def _follow(self, url: str, deadline: float) -> Fetched:
        for _ in range(self._config.redirects + 1):
            if not url.startswith(("http://", "https://")):
                raise InputError("http_redirect", f"Redirected to {url}, which is no http address.")
            with _judged(url), _Watch(deadline), self._opened(url) as response:
                target = response.headers.get("Location")
                if response.status in (301, 302, 303, 307, 308) and target:
                    url = urljoin(url, target)
                    continue
                _require_content(response, url)
                data = self._content(response, url, deadline)
            etag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            return Fetched(data, etag.strip('"'))
        raise InputError("http_redirect", f"More than {self._config.redirects} redirects.")

    @contextlib.contextmanager
    def _opened(self, url: str) -> Iterator[Any]:
        """The answer to a request; its connection is used again only where the answer was read to its end."""
        response = self._pools.request(
            "GET",
            url,
            headers={"User-Agent": _AGENT, "Accept-Encoding": "identity"},
            timeout=urllib3.Timeout(connect=self._config.timeout, read=self._config.timeout),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        try:
            yield response
        finally:
            response.close()

    def _content(self, response: Any, url: str, deadline: float) -> bytes:
        announced = response.headers.get("Content-Length", "")
        pieces, size = [], 0
        if announced.isdigit() and int(announced) > self._max_bytes:
            raise InputError("too_large", f"{announced} bytes are more than {self._max_bytes}.")
        while piece := response.read1(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > self._max_bytes:
                raise InputError("too_large", f"The answer is longer than {self._max_bytes} bytes.")
        if time.monotonic() >= deadline:  # an answer of unknown length ends where its socket is shut
            raise _BusyError("http_timeout", f"{url} was not read in time.")
        if announced.isdigit() and size != int(announced):
            raise _BusyError("http_connection", f"{size} of {announced} bytes of {url} came.")
        return b"".join(pieces)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where it wraps an IPv4 address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        wrapped = found.ipv4_mapped or found.sixtofour
        if wrapped is None and found in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            wrapped = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if found.teredo is not None:
            return False
        if wrapped is not None:
            return is_public(str(wrapped))
    return found.is_global and not found.is_multicast


@contextlib.contextmanager
def _judged(url: str) -> Iterator[None]:
    """Failures of the client as ``_BusyError`` or ``InputError``."""
    try:
        yield
    except AddressRefusedError as error:
        raise InputError("http_address_refused", f"{error} (--http.allow_private lifts this).") from error
    except (LocationValueError, UnicodeError) as error:
        raise InputError("http_invalid_url", f"{url[:200]} is no address: {error}.") from error
    except SSLError as error:
        raise InputError("http_tls", f"The connection to {url} is not trusted: {error}.") from error
    except NewConnectionError as error:  # a SlowError by inheritance
        raise _BusyError("http_connection", f"{url}: {_innermost(error)}.") from error
    except SlowError as error:
        raise _BusyError("http_timeout", f"{url} did not answer in time.") from error
    except (HTTPError, OSError) as error:
        raise _BusyError("http_connection", f"{url}: {_innermost(error)}.") from error


def _innermost(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300].rstrip(".")


def _require_content(response: Any, url: str) -> None:
    status = int(response.status)
    if status in _BUSY:
        raise _BusyError("http_unavailable", f"{url} answers {status}.", _retry_after(response))
    if status != 200:
        raise InputError(f"http_{status}", f"{url} answers {status}.")


def _retry_after(response: Any) -> float | None:
    """Seconds that the server asks for; None if it does not, or not in a known form."""
    text = str(response.headers.get("Retry-After", "")).strip()
    if text.isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _connect(connection: HTTPConnection) -> socket.socket:
    """A socket to an address of the connection's host that was judged, not to its name."""
    host, port = connection._dns_host.strip("[]"), connection.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise NewConnectionError(connection, f"{host} has no address ({error})") from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    for address in addresses:
        if not is_public(address):
            raise AddressRefusedError(f"{host} is {address}, which is private")
    failure: OSError = OSError()
    for address in addresses:
        try:
            return urllib3.util.connection.create_connection(
                (address, port), connection.timeout, connection.source_address, connection.socket_options
            )
        except OSError as error:
            failure = error
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(connection, f"{host} did not answer") from failure
    raise NewConnectionError(connection, f"{host} refuses ({failure})") from failure


class _Watch:
    """Shuts the socket of the requests inside at ``deadline``, whatever they wait for.

    A timeout of a socket begins anew with each byte: an answer may drip, and so may its headers or a handshake.
    """

    def __init__(self, deadline: float) -> None:
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._end)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._twin: socket.socket | None = None
        self._over = False

    def __enter__(self) -> None:
        self._token = _WATCH.set(self)
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        _WATCH.reset(self._token)
        self._timer.cancel()
        self._replace(None)

    def over(self, sock: socket.socket) -> None:
        """Look after this socket from now on."""
        self._replace(socket.socket(fileno=os.dup(sock.fileno())))  # the original may be wrapped, or closed

    def _replace(self, twin: socket.socket | None) -> None:
        with self._lock:
            former, self._twin = self._twin, twin
            if former is not None:
                former.close()
            if self._over:
                self._shut()

    def _end(self) -> None:
        with self._lock:
            self._over = True
            self._shut()

    def _shut(self) -> None:
        if self._twin is not None:
            with contextlib.suppress(OSError):  # the other side was faster
                self._twin.shutdown(socket.SHUT_RDWR)


_WATCH: ContextVar[_Watch] = ContextVar("watch")


class _HTTP(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        sock = self._dial()
        _WATCH.get().over(sock)
        return sock

    def _dial(self) -> socket.socket:
        return super()._new_conn()

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # urllib3's own differs as well
        _WATCH.get().over(self.sock)  # of a connection that is used again, too
        return super().getresponse()


class _HTTPS(_HTTP, HTTPSConnection):
    """With TLS."""


class _PublicHTTP(_HTTP):
    def _dial(self) -> socket.socket:
        return _connect(self)


class _PublicHTTPS(_PublicHTTP, HTTPSConnection):
    """With TLS."""


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class _PublicHTTPPool(HTTPConnectionPool):
    ConnectionCls = _PublicHTTP


class _PublicHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _PublicHTTPS
