"""An object of a store as a file that can be read from any place: headers of tars, footers of Parquet files."""

import io

from pipeline.storage import Storage

AHEAD = 1 << 18


class RangeFile(io.RawIOBase):
    """Reads ranges of one object; ``io.BufferedReader`` around it makes few requests of many reads.

    Args:
        storage: where it is.
        path: its path there.
        size: its bytes.
    """

    def __init__(self, storage: Storage, path: str, size: int) -> None:
        super().__init__()
        self._storage, self._path, self._size, self._position = storage, path, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, also beyond the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill ``buffer`` as far as the object goes."""
        length = max(0, min(len(buffer), self._size - self._position))
        data = self._storage.read_range(self._path, self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_ranges(storage: Storage, path: str, size: int) -> io.BufferedReader:
    """A file of this machine itself, any other object by ranges."""
    local = storage.local(path)
    if local is not None:
        return local.open("rb")
    return io.BufferedReader(RangeFile(storage, path, size), AHEAD)
