"""Indexes that other loaders want beside exported tars; made from the tars, on demand, never the truth.

``dali``: one ``<tar>.idx`` a tar, the text that NVIDIA's ``wds2idx`` makes (v1.2): for each sample the extension,
offset, size and name of its members. ``wids``: one ``wids.json``, the shard list of the indexed reader that
webdataset shipped until 0.2 (``wids``): address, samples and bytes of each tar.
"""

import io
import itertools
import json
from collections.abc import Sequence
from typing import Literal

from iqpir.errors import VerificationError
from pipeline.layout import sha256_hex, to_json
from pipeline.sharding.tar import Member, TarError, read_members
from pipeline.storage import Storage

Index = Literal["dali", "wids"]
WIDS = "wids.json"
DALI_VERSION = "v1.2"
_AGAIN = "export again"


def write_indexes(target: Storage, record: str, kinds: Sequence[Index]) -> list[str]:
    """Read the tars of a finished export back and write the indexes ``kinds``.

    Args:
        target: the output folder.
        record: path of the export's record in it.
        kinds: which.

    Returns:
        Addresses of the indexes.

    Raises:
        VerificationError: a tar is not what the record says.
    """
    if not kinds:
        return []
    facts = json.loads(target.read(record))
    tars = {item["path"]: item["sha256"] for item in facts["objects"] if item["path"].endswith(".tar")}
    written, shards = [], []
    for path, sha256 in tars.items():
        data = target.read(path)
        if sha256_hex(data) != sha256:
            raise VerificationError(f"{target.uri(path)} is not what {record} says.", f"Delete both and {_AGAIN}.")
        samples = _samples(target, path, data)
        shards.append({"url": path, "nsamples": len(samples), "filesize": len(data)})
        if "dali" in kinds:
            written.append(f"{path.removesuffix('.tar')}.idx")
            target.publish(written[-1], dali_index(samples))
    if "wids" in kinds:
        name = str(facts["view"])
        index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": shards}
        target.publish(WIDS, to_json(index))
        written.append(WIDS)
    return [target.uri(path) for path in written]


def dali_index(samples: Sequence[Sequence[Member]]) -> bytes:
    """A line with version and number of samples, then a line a sample: extension, offset, size, name of each member.

    Offsets are those of a member's first byte of data.
    """
    lines = [f"{DALI_VERSION} {len(samples)}"]
    for members in samples:
        parts = (f"{item.name.partition('.')[2]} {item.offset} {item.size} {item.name}" for item in members)
        lines.append(" ".join(parts))
    return ("\n".join(lines) + "\n").encode()


def _samples(target: Storage, path: str, data: bytes) -> list[list[Member]]:
    """Members of a tar, those of a sample together: neighbours with the same name up to the first dot."""
    try:
        members = list(read_members(io.BytesIO(data)))
    except TarError as error:
        raise VerificationError(f"{target.uri(path)} {error}.", f"Delete it and its record and {_AGAIN}.") from error
    return [list(group) for _, group in itertools.groupby(members, key=lambda item: item.name.partition(".")[0])]
