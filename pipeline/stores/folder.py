"""A folder as an object store: whole files appear atomically, and durably, or not at all.

A file is written beside its final name, flushed to the disk, then linked (create-if-absent) or renamed
(replace). A crash leaves at most a hidden ``.name.<random>.tmp``, which no listing shows.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
OPEN_ATTEMPTS = 8
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object."""

    path: str
    """Path below the root it was listed from, ``/`` separated."""
    size: int
    """Bytes."""
    etag: str
    """Changes whenever the content does: the store's ETag, or the modification time in ns on a disk."""
    modified: float
    """Seconds since 1970."""


class ConditionsIgnoredError(OSError):
    """The store cannot create a name only where it is absent."""


class Folder:
    """Files below the file system's root; paths are absolute, ``/`` separated, without the leading one."""

    def read(self, path: str) -> bytes:
        """Whole content."""
        return self._file(path).read_bytes()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``; fewer only at the end of the file."""
        with self._file(path).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def stat(self, path: str) -> Entry:
        """Facts of one file; ``FileNotFoundError`` where there is none (a folder is none)."""
        file = self._file(path)
        facts = file.stat()
        if file.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
        return Entry(path, facts.st_size, str(facts.st_mtime_ns), facts.st_mtime)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Files below the folder ``prefix``, in no order; links to files count, links to folders do not.

        Raises:
            OSError: a folder cannot be read; what it holds would be missed in silence.
        """
        return (entry for entry, temporary in self._walk(prefix) if not temporary)

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        """Temporary files that a crashed writer left below ``prefix``."""
        return (entry for entry, temporary in self._walk(prefix) if temporary)

    def put(self, path: str, data: bytes | Path) -> None:
        """Create or replace ``path`` in one step."""
        with self._temporary(path, data) as temporary:
            os.replace(temporary, self._file(path))

    def create(self, path: str, data: bytes) -> None:
        """Create ``path`` in one step.

        Raises:
            FileExistsError: it is there already.
            ConditionsIgnoredError: the file system has no hard links.
        """
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, self._file(path))
            except FileExistsError:
                raise
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise ConditionsIgnoredError(error.errno, "no hard links here", str(temporary)) from error
                raise

    def remove(self, path: str) -> None:
        """Delete a file that may be gone already; its folder stays, another writer may be about to use it."""
        self._file(path).unlink(missing_ok=True)

    def discard(self, entry: Entry) -> None:
        """Delete what ``unfinished`` listed."""
        self._file(entry.path).unlink(missing_ok=True)

    def download(self, path: str, target: Path) -> None:
        """Copy to a file of this machine."""
        shutil.copyfile(self._file(path), target)

    def uri(self, path: str) -> str:
        """Absolute path."""
        return str(self._file(path))

    def local(self, path: str) -> Path | None:
        """The file itself."""
        return self._file(path)

    @staticmethod
    def _file(path: str) -> Path:
        return Path("/") / path

    def _walk(self, prefix: str) -> Iterator[tuple[Entry, bool]]:
        top = self._file(prefix)
        for folder, _, names in os.walk(top, onerror=_require_absent):
            for name in names:
                file = os.path.join(folder, name)
                try:
                    facts = os.stat(file)
                except FileNotFoundError:  # a dangling link, or removed since the folder was read
                    continue
                entry = Entry(file.lstrip("/"), facts.st_size, str(facts.st_mtime_ns), facts.st_mtime)
                yield entry, name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)

    @contextmanager
    def _temporary(self, path: str, data: bytes | Path) -> Iterator[Path]:
        """A durable copy of ``data`` beside ``path``, gone afterwards; then the folder is flushed."""
        final = self._file(path)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
        try:
            with _open_new(temporary) as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _require_absent(error: OSError) -> None:
    """Pass over a folder that is not there, or is a file; raise where one cannot be read."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _open_new(path: Path) -> BufferedWriter:
    """A new file, in a folder that is made where it is absent, and that another process may remove if empty."""
    for _ in range(OPEN_ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return path.open("xb")
        except FileNotFoundError:
            continue
    return path.open("xb")
