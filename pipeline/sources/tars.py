"""WebDataset tars as they are found: members grouped by key, the picture of each group, its side members.

The key is the member's name up to the first dot of its last part, the extension is what follows; neighbouring
members with one key are one sample (the WebDataset convention). Planning reads headers only.
"""

import json
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from iqpir.errors import UsageError
from pipeline.sources.inputs import EXTENSIONS, Fetched, Input, InputError
from pipeline.sources.uri_list import to_detail
from pipeline.storage import Storage

MEMBER = "#member="
SIDES = ("json", "txt", "cls")
"""Extensions of members that are kept as metadata."""
LONGEST_SIDE = 1 << 20
_GAP = 1 << 16


class DamagedError(Exception):
    """A tar or Parquet file cannot be read (to its end); ``code`` and ``message`` become the row of the file."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(code, message)


class TarIndex:
    """The samples of one tar, from its headers.

    Args:
        file: the tar.
        member: extension of the picture; empty: the one member of a sample with a picture's suffix.
        name: for messages.
    """

    def __init__(self, file: BinaryIO, member: str, name: str) -> None:
        self._file, self._member, self._name = file, member, name
        self.ignored = 0
        """Members that are neither pictures nor kept beside one, and samples without a picture."""

    def samples(self) -> Iterator[tuple[str, int, str]]:
        """Member name, bytes and ``Input.detail`` of each sample's picture.

        Raises:
            DamagedError: the tar ends early, or a header is damaged; the samples before it have been given.
            UsageError: a sample has several pictures.
        """
        group: dict[str, tarfile.TarInfo] = {}
        key, damage = "", None
        try:
            for info in self._members():
                folder, slash, last = info.name.rpartition("/")
                stem, _, extension = last.partition(".")
                if folder + slash + stem != key or extension.lower() in group:
                    yield from self._sample(key, group)
                    key, group = folder + slash + stem, {}
                group[extension.lower()] = info
        except DamagedError as error:
            damage = error
        yield from self._sample(key, group)
        if damage is not None:
            raise damage

    def _members(self) -> Iterator[tarfile.TarInfo]:
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    vars(tar)["members"] = []  # it would keep every header
                    last = info.name.rpartition("/")[2]
                    if not info.isreg() or (last.startswith("__") and last.endswith("__")):
                        self.ignored += info.isreg()
                        continue
                    yield info
                end = tar.offset
        except (tarfile.TarError, EOFError, UnicodeError) as error:
            code = "tar_truncated" if "end of data" in str(error) else "tar_corrupt"
            raise DamagedError(code, f"{self._name}: {error}.") from error
        self._file.seek(end)  # tarfile takes a missing end and a damaged header for the end
        block = self._file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise DamagedError("tar_truncated", f"{self._name} ends without an end-of-archive mark.")
        if any(block):
            raise DamagedError("tar_corrupt", f"{self._name} has a damaged header at byte {end}.")

    def _sample(self, key: str, group: dict[str, tarfile.TarInfo]) -> Iterator[tuple[str, int, str]]:
        if not group:
            return
        extension = self._picture(key, group)
        if extension is None:
            self.ignored += 1
            return
        info = group.pop(extension)
        sides = {name: [group[name].offset_data, group[name].size] for name in SIDES if name in group}
        self.ignored += len(group) - len(sides)
        yield info.name, info.size, to_detail({"offset": info.offset_data, "key": key, "sides": sides})

    def _picture(self, key: str, group: dict[str, tarfile.TarInfo]) -> str | None:
        if self._member:
            return self._member if self._member in group else None
        pictures = [name for name in group if "." + name.rpartition(".")[2] in EXTENSIONS]
        if len(pictures) > 1:
            raise UsageError(
                f"Sample {key!r} of {self._name} has several pictures: {', '.join(sorted(pictures))}.",
                "Choose one with --source.member.",
            )
        return pictures[0] if pictures else None


class TarReader:
    """Reads members of tars below a folder or prefix.

    Args:
        source: what paths are relative to.
        max_bytes: longest member that is read.
    """

    def __init__(self, source: Storage, max_bytes: int) -> None:
        self._source, self._max_bytes = source, max_bytes

    def uri(self, entry: Input) -> str:
        """Address of the tar, and the member as a fragment."""
        return self._source.uri() + "/" + entry.relpath

    def fetch(self, entry: Input) -> Fetched:
        """Bytes of the picture and its side members, in one range where they lie together.

        Raises:
            InputError: the tar is gone or changed, the member is cut or too large.
            OSError: the store fails.
        """
        detail = json.loads(entry.detail)
        if "code" in detail:
            raise InputError(detail["code"], detail["message"])
        path = entry.relpath.partition(MEMBER)[0]
        if entry.size > self._max_bytes:
            raise InputError("too_large", f"{entry.size} bytes are more than {self._max_bytes}.")
        sides = {name: tuple(place) for name, place in detail["sides"].items()}
        wanted = [(detail["offset"], entry.size), *(place for place in sides.values() if place[1] <= LONGEST_SIDE)]
        try:
            found = self._pieces(path, wanted)
            now = self._source.stat(path)
        except FileNotFoundError as error:
            raise InputError("missing", f"{path} was planned and is gone.") from error
        if now.etag != entry.etag:
            raise InputError("input_changed", f"{path} changed after it was planned; run again to append it.")
        data = found[wanted[0]]
        if len(data) != entry.size:
            raise InputError("truncated", f"{path} ends within the member.")
        metadata = {"__key__": detail["key"], **_side_values({name: found.get(at) for name, at in sides.items()})}
        return Fetched(data, now.etag, metadata)

    def _pieces(self, path: str, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Ranges (offset, length) and their bytes; neighbours are read together."""
        found: dict[tuple[int, int], bytes] = {}
        group: list[tuple[int, int]] = []
        for place in [*sorted(wanted), None]:
            if group and (place is None or place[0] > sum(group[-1]) + _GAP):
                start, end = group[0][0], sum(group[-1])
                data = self._source.read_range(path, start, end - start)
                found |= {(at, size): data[at - start : at - start + size] for at, size in group}
                group = []
            if place is not None:
                group.append(place)
        return found


def _side_values(sides: dict[str, bytes | None]) -> dict[str, Any]:
    """Metadata from side members: json as it is, cls as a number where it is one, txt as text."""
    values: dict[str, Any] = {}
    unread: dict[str, str] = {}
    for name, data in sides.items():
        if data is None:
            unread[name] = f"is longer than {LONGEST_SIDE} bytes"
            continue
        try:
            text = data.decode("utf-8")
            values[name] = json.loads(text) if name == "json" else text
        except ValueError as error:
            unread[name] = f"{type(error).__name__}: {error}"[:200]
        if name == "cls" and name in values and values[name].strip().isdecimal():
            values[name] = int(values[name])
    return {**values, "unread": unread} if unread else values
