"""Object stores that fsspec reaches: whole objects, a deadline on every call. The only importer of fsspec.

S3 settings follow from measurements: by default s3fs waits 25 minutes for a silent server, and its cache
shows old listings. Endpoint and credentials come from the standard chain (``AWS_ENDPOINT_URL`` and so on).
"""

import errno
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from botocore.exceptions import BotoCoreError, ClientError
from fsspec.asyn import AsyncFileSystem

from iqpir.errors import UsageError
from pipeline.stores.folder import ConditionsIgnoredError, Entry

PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory"})
"""Object stores. fsspec has more, such as ftp, zip and github: they want options, or are no stores of whole objects."""
REACH_SECONDS = 12.0
"""How long opening a remote URL may take before it counts as unreachable."""
CALL_SECONDS = 60.0
"""Deadline of one small call, retries included."""
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""A transfer slower than this runs into its deadline."""
WHOLE_OBJECT_SECONDS = 900.0
"""Deadline of reading an object whose size is not known, and of a whole listing."""

S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "skip_instance_cache": True,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"mode": "standard", "max_attempts": 4},
    },
}
S3_RETRIES = 3
"""Retries of s3fs around those of botocore; with the timeouts they bound a silent server."""

_CONFLICT = {"409", "412", "PreconditionFailed", "ConditionalRequestConflict", "OperationAborted"}
_REFUSED = {"501", "NotImplemented"}


def connect(url: str) -> tuple["Objects", str]:
    """The store of a URL, and the path of the URL in it.

    Raises:
        UsageError: a protocol that is not in ``PROTOCOLS``, missing package, unreachable store or missing bucket.
    """
    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS:
        raise UsageError(
            f"Cannot open {url}: {protocol}:// is no store that is used here.",
            f"Give a folder, or a URL that begins with {', '.join(sorted(PROTOCOLS))}.",
        )
    store = S3Objects("s3") if protocol in ("s3", "s3a") else Objects(protocol)
    try:
        root = str(store.fs._strip_protocol(url)).strip("/")
    except (ValueError, ImportError) as error:
        raise UsageError(f"Cannot open {url}: {error}.") from error
    store.reach(root)
    return store, root


class Objects:
    """A store that fsspec reaches; a fresh connection in each process. Paths are whole, without protocol."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self._connection: tuple[int, Any] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.protocol,)

    @property
    def fs(self) -> Any:
        """The file system, made anew after a fork."""
        with self._lock:
            if self._connection is None or self._connection[0] != os.getpid():
                self._connection = (os.getpid(), self._open())
            return self._connection[1]

    def _open(self) -> Any:
        return fsspec.filesystem(self.protocol)

    def call(self, name: str, *args: Any, seconds: float = CALL_SECONDS, **options: Any) -> Any:
        """One method of the file system, with a deadline where it has one; failures are ``OSError``."""
        fs = self.fs
        if isinstance(fs, AsyncFileSystem):
            options["timeout"] = seconds
        with _as_os_errors(name, seconds):
            return getattr(fs, name)(*args, **options)

    def read(self, path: str) -> bytes:
        """Whole object."""
        return bytes(self.call("cat_file", path, seconds=WHOLE_OBJECT_SECONDS))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``; fewer only at the end of the object."""
        seconds = CALL_SECONDS + length / SLOWEST_BYTES_PER_SECOND
        return bytes(self.call("cat_file", path, start=offset, end=offset + length, seconds=seconds))

    def stat(self, path: str) -> Entry:
        """Facts of one object; ``FileNotFoundError`` where there is none (a prefix is none)."""
        facts = self.call("info", path)
        if facts["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.uri(path))
        return _entry(facts)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects below ``prefix``."""
        found = self.call("find", prefix, detail=True, seconds=WHOLE_OBJECT_SECONDS)
        return (_entry(facts) for facts in found.values() if facts["type"] == "file")

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        """Nothing: only S3 keeps parts of uploads."""
        return iter(())

    def put(self, path: str, data: bytes | Path) -> None:
        """Create or replace ``path`` with one request (or one completed multipart upload)."""
        if isinstance(data, Path):
            seconds = CALL_SECONDS + data.stat().st_size / SLOWEST_BYTES_PER_SECOND
            self.call("put_file", str(data), path, seconds=seconds)
        else:
            self.call("pipe_file", path, data, seconds=CALL_SECONDS + len(data) / SLOWEST_BYTES_PER_SECOND)

    def create(self, path: str, data: bytes) -> None:
        """Create ``path`` where it is absent.

        Raises:
            FileExistsError: it is there, or another writer is creating it right now.
            ConditionsIgnoredError: the store refuses the condition.
        """
        try:
            self.call("pipe_file", path, data, mode="create")
        except FileExistsError:
            raise
        except OSError as error:
            answer = _http_answer(error)
            if answer & _CONFLICT:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.uri(path)) from error
            if answer & _REFUSED:
                raise ConditionsIgnoredError(errno.ENOSYS, "conditions are refused", self.uri(path)) from error
            raise

    def remove(self, path: str) -> None:
        """Delete an object that may be gone already."""
        try:
            self.call("rm_file", path)
        except FileNotFoundError:
            return

    def discard(self, entry: Entry) -> None:
        """Delete what ``unfinished`` listed."""
        self.remove(entry.path)

    def download(self, path: str, target: Path) -> None:
        """Copy to a file of this machine."""
        self.call("get_file", path, str(target), seconds=WHOLE_OBJECT_SECONDS)

    def uri(self, path: str) -> str:
        """URL."""
        return f"{self.protocol}://{path}"

    def local(self, path: str) -> Path | None:
        """None: there is no file."""
        return None

    def reach(self, root: str) -> None:
        """Nothing to check: only S3 is behind a network here."""


class S3Objects(Objects):
    """S3 and what is compatible with it."""

    def _open(self) -> Any:
        account = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        return _s3_filesystem(os.getpid(), account)

    def reach(self, root: str) -> None:
        """List one object below ``root``.

        Raises:
            UsageError: no answer within ``REACH_SECONDS``, no such bucket, or no access.
        """
        bucket, _, prefix = root.partition("/")
        if not bucket:
            raise UsageError("s3:// names no bucket.", "Write s3://bucket/prefix.")
        try:
            self.call("call_s3", "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1, seconds=REACH_SECONDS)
        except OSError as error:
            reason = str(error) or type(error).__name__
            raise UsageError(
                f"Cannot reach {self.uri(root)}: {reason.rstrip('.')}.",
                "Check AWS_ENDPOINT_URL and credentials.",
            ) from error

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects below ``prefix``, page by page."""
        bucket, _, key = prefix.partition("/")
        for page in self._pages("list_objects_v2", bucket, key):
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # markers that consoles create for folders
                    yield _entry({**found, "name": f"{bucket}/{found['Key']}", "size": found["Size"]})

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        """Multipart uploads that were neither completed nor aborted; the etag is the upload's id."""
        bucket, _, key = prefix.partition("/")
        for page in self._pages("list_multipart_uploads", bucket, key):
            for upload in page.get("Uploads", ()):
                path, began = f"{bucket}/{upload['Key']}", upload["Initiated"].timestamp()
                yield Entry(path, 0, upload["UploadId"], began)

    def discard(self, entry: Entry) -> None:
        """Abort one multipart upload."""
        bucket, _, key = entry.path.partition("/")
        try:
            self.call("call_s3", "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=entry.etag)
        except FileNotFoundError:
            return

    def _pages(self, method: str, bucket: str, key: str) -> Iterator[dict[str, Any]]:
        following: dict[str, Any] = {}
        prefix = f"{key}/" if key else ""
        while True:
            page = self.call("call_s3", method, Bucket=bucket, Prefix=prefix, **following)
            yield page
            if not page.get("IsTruncated"):
                return
            if method == "list_objects_v2":
                following = {"ContinuationToken": page["NextContinuationToken"]}
            else:
                following = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


@functools.lru_cache(maxsize=8)
def _s3_filesystem(pid: int, account: tuple[tuple[str, str], ...]) -> Any:
    """One client a process and account: making one takes a second, and it must not outlive a fork."""
    fs = fsspec.filesystem("s3", **S3_OPTIONS)
    fs.retries = S3_RETRIES
    return fs


def _entry(facts: dict[str, Any]) -> Entry:
    modified = facts.get("LastModified", facts.get("mtime", facts.get("created", 0.0)))
    seconds = modified.timestamp() if isinstance(modified, datetime) else float(modified)
    etag = str(facts.get("ETag") or facts.get("etag") or seconds).strip('"')
    return Entry(str(facts["name"]).strip("/"), int(facts["size"]), etag, seconds)


@contextmanager
def _as_os_errors(name: str, seconds: float) -> Iterator[None]:
    """Failures of the client library as ``OSError``, the one kind that callers retry."""
    try:
        yield
    except TimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, f"{name} had no answer within {seconds:.0f} s") from error
    except _client_errors() as error:
        raise OSError(errno.EIO, str(error) or type(error).__name__) from error


@functools.cache
def _client_errors() -> tuple[type[Exception], ...]:
    """What the libraries of S3 raise besides ``OSError``; aiohttp is slow to import, so only in need."""
    from aiohttp import ClientError as ConnectionLost

    return BotoCoreError, ClientError, ConnectionLost


def _http_answer(error: BaseException) -> set[str]:
    """Status and error code of the HTTP answer behind an error, where there is one."""
    found: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            found |= {
                str(response.get("Error", {}).get("Code", "")),
                str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")),
            }
        cause = cause.__cause__
    return found
