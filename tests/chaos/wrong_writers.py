"""Drivers that break the protocol in one point each. Called in the process that shall be one."""

import os
from pathlib import Path
from typing import Any

from pipeline.commits import units
from pipeline.commits.records import Record, commit
from pipeline.storage import Storage
from pipeline.stores.folder import Folder


def stream_to_the_final_name() -> None:
    """No temporary file: readers see objects grow."""

    def put(_: Folder, path: str, data: bytes | Path) -> None:
        final = Path("/") / path
        final.parent.mkdir(parents=True, exist_ok=True)
        with final.open("wb") as file:
            file.write(data.read_bytes() if isinstance(data, Path) else data)
            file.flush()
            os.fsync(file.fileno())

    Folder.put = put  # type: ignore[method-assign]


def commit_before_the_payload() -> None:
    """The record first, then what it names."""
    waiting: list[tuple[Storage, str, bytes]] = []
    publish = Storage.publish

    def later(self: Storage, path: str, data: bytes | Path) -> None:
        if path.startswith(("shards/", "samples/")):
            waiting.append((self, path, data.read_bytes() if isinstance(data, Path) else data))
        else:
            publish(self, path, data)

    def commit_first(*args: Any) -> Record:
        record = commit(*args)
        while waiting:
            publish(*waiting.pop(0))
        return record

    Storage.publish = later  # type: ignore[method-assign]
    units.commit = commit_first


def overwrite_records() -> None:
    """The last record wins; the probe is lied to."""
    create, put = Folder.create, Folder.put

    def overwrite(self: Folder, path: str, data: bytes) -> None:
        if "/_commits/" in path:
            put(self, path, data)
        else:
            create(self, path, data)

    Folder.create = overwrite  # type: ignore[method-assign]


def forget_a_sample() -> None:
    """A seal that leaves the last unit out."""
    from pipeline.commits import seal

    write = seal._write

    def fewer(storage: Storage, found: Any, generations: Any, totals: Any) -> Any:
        return write(storage, found[:-1], generations, totals)

    seal._write = fewer
