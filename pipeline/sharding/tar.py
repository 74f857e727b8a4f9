"""Tars that are the same bytes for the same members, and a reader that trusts nothing.

Shortened tars often read as clean ones: a cut at a member's boundary, one flipped bit in a header, a file of
zeros. The strict reader accepts exactly what the writer makes.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MEMBER_MODE = 0o444


class TarError(ValueError):
    """The file is not a tar as ``TarWriter`` makes it."""


class TarWriter:
    """Write a USTAR file with fixed times, owners and modes; knows its sha256 when closed.

    Args:
        path: a file that does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._hashing = _Hashing(self._file)
        self._tar = tarfile.open(fileobj=self._hashing, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its first byte in the file."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), MEMBER_MODE
        offset = self._hashing.position + BLOCK
        # Not addfile: it copies in pieces of 16 KiB, each hashed and written alone.
        self._hashing.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
        self._hashing.write(data)
        self._hashing.write(bytes(-len(data) % BLOCK))
        self._tar.offset = self._hashing.position
        return offset

    @property
    def sha256(self) -> str:
        """64 hex digits of the whole file; call after the block has ended."""
        return self._hashing.sha256.hexdigest()

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # a failed tar gets no end, so that nobody can take it for a whole one
            self._tar.close()
        self._file.close()


class _Hashing(io.RawIOBase):
    """Passes what is written on, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file, self.sha256, self.position = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes written."""
        return self.position

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """All of ``data``."""
        self.sha256.update(data)
        self.position += len(data)
        return self.file.write(data)


@dataclass(frozen=True, slots=True)
class Member:
    """One member as it lies in the file."""

    name: str
    offset: int
    """Of its first byte of data."""
    size: int
    sha256: str


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Members of a tar in their order, checked to the last byte of the file.

    Raises:
        TarError: a damaged or foreign header, a link or folder, padding that is not zero, a missing end.
    """
    while True:
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise TarError(f"ends without an end-of-archive mark, at byte {file.tell()}")
        if not any(header):
            _check_end(file)
            return
        info = _parse(header, file.tell() - BLOCK)
        data = file.read(info.size)
        padding = file.read(-info.size % BLOCK)
        if len(data) < info.size or len(padding) < -info.size % BLOCK:
            raise TarError(f"member {info.name} is cut")
        if any(padding):
            raise TarError(f"member {info.name} is followed by bytes that are not zero")
        offset = file.tell() - len(padding) - info.size
        yield Member(info.name, offset, info.size, hashlib.sha256(data).hexdigest())


def _parse(header: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise TarError(f"damaged header at byte {position}: {error}") from error
    if info.type != tarfile.REGTYPE or info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") != header:
        raise TarError(f"foreign header at byte {position}: {info.name!r}")
    return info


def _check_end(file: BinaryIO) -> None:
    rest = file.read()
    if len(rest) < BLOCK:
        raise TarError("has half an end-of-archive mark")
    if any(rest):
        raise TarError("has bytes after its end-of-archive mark")
    if file.tell() % tarfile.RECORDSIZE:
        raise TarError(f"is cut after its end-of-archive mark, at byte {file.tell()}")
