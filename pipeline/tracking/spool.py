"""An append-only file of records that shall be delivered, and how far they have been.

A record is safe from the death of the process as soon as ``append`` returns; what a crash cut is dropped
when the file is opened again. One process writes a spool at a time.
"""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 256 * 2**20
"""Largest spool file; a run of a million steps that logs every 50 needs about 10 MB."""


@dataclass(frozen=True)
class Chunk:
    """Records in the order of their appending."""

    records: list[dict[str, Any]]
    end: int
    """Offset behind the last one; ``Spool.advance`` takes it."""


class Spool:
    """Records in ``<folder>/<name>.jsonl``; ``<name>.delivered`` holds the offset of the first open one.

    ``append`` may be called from any thread, ``read`` and ``advance`` from one.

    Args:
        folder: is created.
        name: of the two files.
        max_bytes: a full spool takes no more records.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int = MAX_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._cursor = folder / f"{name}.jsonl", folder / f"{name}.delivered"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._start = self._recorded_start()
        self._end, self._open = self._complete_lines()
        os.ftruncate(self._file, self._end)

    @property
    def pending(self) -> int:
        """Weight of the records that are not delivered; the sum of what ``append`` was given."""
        with self._lock:
            return self._open

    def append(self, record: dict[str, Any], weight: int = 1) -> bool:
        """Keep a record of JSON values; False when the spool is full.

        Raises:
            OSError: the disk does not take it; nothing was appended.
        """
        line = json.dumps({**record, "weight": weight}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._end + len(line) > self._max_bytes:
                return False
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written")
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
            self._end += len(line)
            self._open += weight
        return True

    def read(self, limit: int) -> Chunk | None:
        """The next open records, until their weight reaches ``limit``; None when all are delivered."""
        with self._lock:
            start, end = self._start, self._end
        records: list[dict[str, Any]] = []
        weight = 0
        with self.path.open("rb") as file:
            file.seek(start)
            while start < end and weight < limit:
                line = file.readline()
                start += len(line)
                record = json.loads(line)
                weight += record["weight"]
                records.append(record)
        return Chunk(records, start) if records else None

    def advance(self, chunk: Chunk) -> None:
        """Remember that ``chunk`` needs no more delivery."""
        draft = self._cursor.with_suffix(".draft")
        draft.write_text(str(chunk.end), encoding="ascii")
        draft.replace(self._cursor)
        with self._lock:
            self._start = chunk.end
            self._open -= sum(record["weight"] for record in chunk.records)

    def close(self) -> None:
        """Release the file; the spool cannot be used any more."""
        os.close(self._file)

    def _recorded_start(self) -> int:
        """0 where the cursor is absent or not of this file: whoever delivers must recognise repetitions."""
        try:
            start = int(self._cursor.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return 0
        return start if start <= os.fstat(self._file).st_size else 0

    def _complete_lines(self) -> tuple[int, int]:
        """Offset behind the last whole record, and the weight of the open ones.

        What comes after a damaged record (a power cut may leave zeros) is given up.
        """
        end, weight = self._start, 0
        with self.path.open("rb") as file:
            file.seek(self._start)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    weight += json.loads(line)["weight"]
                except (ValueError, KeyError, TypeError):
                    break
                end += len(line)
        return end, weight
