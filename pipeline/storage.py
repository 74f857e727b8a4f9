"""Folders, ``s3://`` and other object stores of fsspec behind one small interface: the one door to storage.

Nothing is ever streamed to its final name: objects appear whole. ``publish`` replaces (for names that carry a
digest), ``create`` makes a name only where it is absent and answers with the content that won (for records).
A store that ignores the condition is found out by a probe, never guessed from its address.
"""

import builtins
import errno
import os
import random
import secrets
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from iqpir.errors import UsageError
from pipeline.stores.folder import ConditionsIgnoredError, Entry, Folder
from pipeline.stores.objects import connect

__all__ = ["Entry", "Storage"]

CREATE_ATTEMPTS = 6


class Backend(Protocol):
    """What a kind of store must do; paths are whole, without the protocol."""

    def read(self, path: str) -> bytes:
        """Whole object."""

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Part of an object."""

    def stat(self, path: str) -> Entry:
        """Facts of one object, or ``FileNotFoundError``."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects below a folder, in any order."""

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        """What crashed writers left below a folder."""

    def put(self, path: str, data: bytes | Path) -> None:
        """Create or replace an object in one step."""

    def create(self, path: str, data: bytes) -> None:
        """Create an object, or ``FileExistsError``, or ``ConditionsIgnoredError``."""

    def remove(self, path: str) -> None:
        """Delete an object that may be gone already."""

    def discard(self, entry: Entry) -> None:
        """Delete one entry of ``unfinished``."""

    def download(self, path: str, target: Path) -> None:
        """Copy an object to a local file."""

    def uri(self, path: str) -> str:
        """Address for people and other programs."""

    def local(self, path: str) -> Path | None:
        """The file behind an object, where there is one."""


class Storage:
    """A folder or a prefix; every path is relative to it, ``/`` separated. Travels between processes.

    Attributes:
        url: what it was opened with; a folder as an absolute path.
    """

    def __init__(self, url: str, backend: Backend, root: str, conditional: bool | None = None) -> None:
        """Internal; use ``Storage.open``. ``conditional`` is the probe's answer where it is known."""
        self.url, self._backend, self._root, self._conditional = url, backend, root, conditional

    @classmethod
    def open(cls, url: str) -> "Storage":
        """The storage at a folder, ``file://``, ``s3://bucket/prefix``, ``memory://`` or another object store.

        Writes nothing, and a folder need not exist yet.

        Raises:
            UsageError: the protocol is unknown, or the store cannot be reached within seconds.
        """
        if not url:
            raise UsageError("An empty string is no folder or URL.")
        protocol, separator, rest = url.partition("://")
        if not separator or protocol.lower() in ("file", "local"):
            folder = os.path.abspath(os.path.expanduser(rest if separator else url))
            return cls(folder, Folder(), folder.strip("/"))
        url = f"{protocol.lower()}://{rest}"
        backend, root = connect(url)
        return cls(url.rstrip("/"), backend, root)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.url, self._backend, self._root, self._conditional)

    def child(self, prefix: str) -> "Storage":
        """The storage below ``prefix``."""
        path = self._path(prefix)
        return Storage(f"{self.url}/{prefix.strip('/')}", self._backend, path, self._conditional)

    def uri(self, path: str = "") -> str:
        """Address of an object for people, logs and other programs: an absolute path or a URL."""
        return self._backend.uri(self._path(path))

    def local(self, path: str) -> Path | None:
        """The file behind ``path`` where this is a folder of this machine, else None."""
        return self._backend.local(self._path(path))

    def read(self, path: str) -> bytes:
        """Whole object. Raises ``FileNotFoundError``, or ``OSError`` when retries are used up."""
        return self._backend.read(self._path(path))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; fewer only where the object ends."""
        return self._backend.read_range(self._path(path), offset, length) if length else b""

    def download(self, path: str, target: Path) -> None:
        """Copy an object to a file of this machine (not atomically: choose a temporary name)."""
        self._backend.download(self._path(path), target)

    def stat(self, path: str) -> Entry:
        """Size, etag and age of one object. Raises ``FileNotFoundError``."""
        return self._relative(self._backend.stat(self._path(path)))

    def exists(self, path: str) -> bool:
        """Whether the object is there."""
        try:
            self.stat(path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> builtins.list[Entry]:
        """Every object below the folder ``prefix``, sorted by path; empty where there is none."""
        return self._listing(self._backend.list(self._path(prefix)))

    def unfinished(self) -> builtins.list[Entry]:
        """What crashed writers left: temporary files of a folder, open multipart uploads of S3."""
        return self._listing(self._backend.unfinished(self._root))

    def discard(self, entry: Entry) -> None:
        """Delete one entry of ``unfinished``."""
        self._backend.discard(Entry(self._path(entry.path), entry.size, entry.etag, entry.modified))

    def publish(self, path: str, data: bytes | Path) -> None:
        """Store a whole object in one step, replacing an earlier one of that name. Idempotent.

        Args:
            path: its name; carries a digest of the content, unless the object is a pointer.
            data: the content, or a file of this machine that has it.
        """
        full = self._path(path)
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        try:
            self._backend.put(full, data)
        except OSError:
            # The reply may be what got lost: the object itself says whether it was stored.
            if not self._holds(full, data, size):
                raise
            return
        if isinstance(data, Path) and self._backend.stat(full).size != size:
            raise OSError(errno.EIO, "stored with another size", self.uri(path))

    def create(self, path: str, data: bytes) -> bytes:
        """Store a small object only where its name is free.

        On a store without conditions (``conditional`` is False) two writers at once may both believe that
        they won; use names that carry a digest there (``pipeline.commits.units.commit`` does).

        Returns:
            The content that is stored now: ``data``, or that of an earlier writer.
        """
        full = self._path(path)
        if not self.conditional:
            if not self.exists(path):
                self.publish(path, data)
            return self._backend.read(full)
        for attempt in range(CREATE_ATTEMPTS):
            try:
                self._backend.create(full, data)
            except FileExistsError:
                # Perhaps our own: the reply to a successful request was lost and the request sent again.
                try:
                    return self._backend.read(full)
                except FileNotFoundError:
                    time.sleep(random.uniform(0.05, 0.2) * 2**attempt)  # a conflict with a writer in progress
                    continue
            except OSError:
                # Perhaps only the replies got lost: whatever is there now has won, be it ours or another's.
                if not self._is_there(full):
                    raise
                return self._backend.read(full)
            return data
        raise OSError(errno.EBUSY, "conflicts with other writers do not end", self.uri(path))

    def remove(self, path: str) -> None:
        """Delete an object that may be gone already."""
        self._backend.remove(self._path(path))

    @property
    def conditional(self) -> bool:
        """Whether ``create`` is exclusive here. Probed once, by creating one random name twice.

        Raises:
            UsageError: nothing can be written here.
        """
        if self._conditional is None:
            self._conditional = self._probe()
        return self._conditional

    def _probe(self) -> bool:
        path = self._path(f"_probe/{secrets.token_hex(8)}")
        try:
            self._backend.create(path, b"first")
            self._backend.create(path, b"second")
        except FileExistsError:
            return self._backend.read(path) == b"first"
        except ConditionsIgnoredError:
            return False
        except (PermissionError, NotADirectoryError) as error:
            raise UsageError(f"Cannot write to {self.url}: {error}.", "Check the path and its permissions.") from error
        finally:
            self._discard_probe(path)
        return False

    def _discard_probe(self, path: str) -> None:
        try:
            self._backend.remove(path)
            folder = self.local("_probe")
            if folder is not None:
                folder.rmdir()
        except OSError:
            return  # a store may let us write and not delete, or others probe it too; gc finds what is left

    def _holds(self, full: str, data: bytes | Path, size: int) -> bool:
        try:
            if isinstance(data, Path):
                return self._backend.stat(full).size == size
            return self._backend.read(full) == data
        except OSError:
            return False

    def _is_there(self, full: str) -> bool:
        try:
            self._backend.stat(full)
        except OSError:
            return False
        return True

    def _path(self, path: str) -> str:
        parts = PurePosixPath(path.strip("/")).parts
        if ".." in parts:
            raise ValueError(f"{path!r} leaves the storage {self.url}")
        return "/".join((self._root, *parts)) if self._root else "/".join(parts)

    def _relative(self, entry: Entry) -> Entry:
        path = entry.path[len(self._root) + 1 :] if self._root else entry.path
        return Entry(path, entry.size, entry.etag, entry.modified)

    def _listing(self, entries: Iterator[Entry]) -> builtins.list[Entry]:
        return sorted((self._relative(entry) for entry in entries), key=lambda entry: entry.path)
