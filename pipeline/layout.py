"""Names and schemas of a corpus, in one place; and the one way a table becomes Parquet bytes.

::

    _plan/g000001.json + g000001-<sha12>.parquet       inputs cut into units
    _commits/<step>/<fingerprint>/<unit_id>.json       the one commit point of a piece of work; ~1, ~2: done again
    shards/<collection>-000012-<sha12>.tar             <key>.<ext> = the original bytes, <key>.json
    samples/000012-<sha12>.parquet                     one row per input: success, rejected_* or failed_*
    scores/<metric>/<fingerprint>/000012-<sha12>.parquet + _metric.json
    codes/<stage-1 digest>/000012-<sha12>.parquet
    labels/<name>/000012-<sha12>.parquet + _labels.json (_labels-0002.json ...), calibrations/<name>.json
    hashes/<fingerprint>/000012-<sha12>.parquet
    dedup/<name>/000012-<sha12>.parquet + _dedup.json
    views/<name>/v0001.parquet + .json
    _manifest/v000001.parquet + .json, _SUCCESS, shards.txt

A ``<sha12>`` is the beginning of the object's own sha256: the same name always holds the same bytes. Names
that begin with ``_`` are control files, which readers of tables skip.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
"""Version of everything this module names; raised when a reader of the former one would misread."""

SUCCESS = "_SUCCESS"
SHARD_LIST = "shards.txt"
PROBE_PREFIX = "_probe"

_ORDINAL = re.compile(r"/(\d{6,})-[0-9a-f]{12}\.parquet$")

INPUTS = pa.schema(
    [
        ("unit_id", pa.string()),
        ("ordinal", pa.int32()),
        ("relpath", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
    ]
)
"""A plan: one row per input, in units of neighbouring rows."""

DETAILED_INPUTS = INPUTS.append(pa.field("detail", pa.string()))
"""A plan of lists or tars: ``detail`` is JSON (``pipeline.sources.inputs.Input``)."""

REMOVED = pa.schema([("relpath", pa.string())])
"""Inputs that a pruning plan removes: one row per input."""

SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("relpath", pa.string()),
        ("collection", pa.string()),
        ("input_etag", pa.string()),
        ("input_size", pa.int64()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("unit_id", pa.string()),
        ("ordinal", pa.int32()),
        ("shard", pa.string()),
        ("member", pa.string()),
        ("byte_offset", pa.int64()),
        ("byte_size", pa.int64()),
        ("sha256", pa.string()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("channels", pa.int32()),
        ("bit_depth", pa.int32()),
        ("exif_orientation", pa.int32()),
        ("icc_profile", pa.bool_()),
        ("crop_x", pa.int32()),
        ("crop_y", pa.int32()),
        ("crop_size", pa.int32()),
        ("metadata", pa.string()),
    ]
)
"""One row per sample, and one per input that gave none. Sizes in pixels and bytes; unknown facts are null."""

SAMPLE_REFERENCE = pa.schema(
    [
        SAMPLES.field(name)
        for name in ("key", "shard", "member", "byte_offset", "byte_size", "sha256", "width", "height")
    ]
)
"""What a view needs to find a sample."""

SAMPLE_SOURCE = pa.schema([SAMPLES.field(name) for name in ("collection", "relpath")])
"""What a view says of where a sample came from; its label columns follow."""

SCORES = pa.schema(
    [
        ("key", pa.string()),
        ("sample_sha256", pa.string()),
        ("raw", pa.float32()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("seconds", pa.float32()),
    ]
)
"""Raw scores of one metric: one row per sample of the unit, null where the status is no success."""

TILED_SCORES = pa.schema(
    [
        *SCORES,
        ("tiles", pa.int32()),
        ("tile_mean", pa.float32()),
        ("tile_p10", pa.float32()),
        ("tile_min", pa.float32()),
    ]
)
"""Scores of pictures cut into tiles: ``raw`` is one of the three; p10 and min count from the worse end."""

HASHES = pa.schema(
    [
        ("key", pa.string()),
        ("sample_sha256", pa.string()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("pixel_digest", pa.string()),
        ("phash", pa.binary(8)),
        ("contrast", pa.float32()),
        ("thumbnail", pa.binary(192)),
    ]
)
"""What near-duplicates are known by (``pipeline.duplicates.hashes``); null where the status is no success."""

DEDUP = pa.schema(
    [
        ("key", pa.string()),
        ("cluster", pa.string()),
        ("cluster_size", pa.int32()),
        ("duplicate_of", pa.string()),
        ("match", pa.string()),
    ]
)
"""``cluster`` is its smallest key. ``duplicate_of``: the sample kept in place of this one, null if it is kept;
``match``: what ties it to that one or to the cluster's first (bytes, pixels, perceptual), null for itself."""

MANIFEST = pa.schema(
    [
        ("unit_id", pa.string()),
        ("ordinal", pa.int32()),
        ("generation", pa.int32()),
        ("collection", pa.string()),
        ("shard", pa.string()),
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
        ("table", pa.string()),
        ("table_bytes", pa.int64()),
        ("table_sha256", pa.string()),
        ("rows", pa.int64()),
        ("inputs", pa.int64()),
        ("success", pa.int64()),
        ("rejected", pa.int64()),
        ("failed", pa.int64()),
        ("samples", pa.int64()),
        ("superseded", pa.list_(pa.string())),
    ]
)
"""One row per unit: its objects, its counts as committed, and the inputs that a later unit replaced."""


def label_schema(metrics: tuple[str, ...]) -> pa.Schema:
    """Columns of a label table for these metrics."""
    scores: list[tuple[str, pa.DataType]] = []
    for metric in metrics:
        scores += [
            (f"iqa_{metric}", pa.float32()),
            (f"iqa_{metric}_cal", pa.float32()),
            (f"iqa_{metric}_status", pa.string()),
        ]
    consensus = [
        ("quality", pa.float32()),
        ("quality_std", pa.float32()),
        ("quality_bin", pa.int32()),
        ("hq_plus", pa.bool_()),
    ]
    return pa.schema([("key", pa.string()), *scores, *consensus])


@dataclass(frozen=True, kw_only=True)
class ObjectRef:
    """An object with its proof; every JSON document lists those it stands for under ``objects``."""

    path: str
    bytes: int
    sha256: str
    rows: int | None = None
    """Rows of a table; None for other objects."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ObjectRef":
        """Inverse of ``to_dict``."""
        return cls(path=values["path"], bytes=values["bytes"], sha256=values["sha256"], rows=values.get("rows"))


def plan_path(generation: int) -> str:
    """The plan of one generation (from 1)."""
    return f"_plan/g{generation:06d}.json"


def plan_table_path(generation: int, sha256: str) -> str:
    """Its inputs."""
    return f"_plan/g{generation:06d}-{sha256[:12]}.parquet"


def commit_prefix(step: str, fingerprint: str) -> str:
    """Folder of the commit records of one step under one configuration."""
    return f"_commits/{step}/{fingerprint}"


def commit_name(unit_id: str, retry: int = 0) -> str:
    """Name of a unit's record in that folder, without a suffix; ``retry`` counts the times it was done again."""
    return f"{unit_id}~{retry}" if retry else unit_id


def parse_commit_name(name: str) -> tuple[str, int]:
    """Inverse of ``commit_name``."""
    unit_id, _, retry = name.partition("~")
    return unit_id, int(retry or 0)


def shard_path(collection: str, ordinal: int, sha256: str) -> str:
    """A tar of samples."""
    return f"shards/{collection}-{ordinal:06d}-{sha256[:12]}.tar"


def samples_path(ordinal: int, sha256: str) -> str:
    """The rows of a unit's inputs."""
    return f"samples/{ordinal:06d}-{sha256[:12]}.parquet"


def scores_path(metric: str, fingerprint: str, ordinal: int, sha256: str) -> str:
    """The scores of a unit's samples by one metric."""
    return f"scores/{metric}/{fingerprint}/{ordinal:06d}-{sha256[:12]}.parquet"


def metric_facts_path(metric: str, fingerprint: str) -> str:
    """What a fingerprint of scores stands for."""
    return f"scores/{metric}/{fingerprint}/_metric.json"


def codes_path(stage1_digest: str, ordinal: int, sha256: str) -> str:
    """The code indices of a unit's samples under one stage-1 network."""
    return f"codes/{stage1_digest}/{ordinal:06d}-{sha256[:12]}.parquet"


def labels_path(name: str, ordinal: int, sha256: str) -> str:
    """The labels of a unit's samples."""
    return f"labels/{name}/{ordinal:06d}-{sha256[:12]}.parquet"


def labels_index_path(name: str, version: int = 1) -> str:
    """What a set of labels was made from, and its objects; labels of a grown corpus are a further version."""
    return f"labels/{name}/_labels.json" if version == 1 else f"labels/{name}/_labels-{version:04d}.json"


def hashes_path(fingerprint: str, ordinal: int, sha256: str) -> str:
    """The hashes of a unit's samples."""
    return f"hashes/{fingerprint}/{ordinal:06d}-{sha256[:12]}.parquet"


def dedup_path(name: str, ordinal: int, sha256: str) -> str:
    """The clusters of a unit's samples."""
    return f"dedup/{name}/{ordinal:06d}-{sha256[:12]}.parquet"


def dedup_index_path(name: str) -> str:
    """How near-duplicates were found, and the objects that say which they are."""
    return f"dedup/{name}/_dedup.json"


def calibration_path(name: str) -> str:
    """A frozen calibration."""
    return f"calibrations/{name}.json"


def view_path(name: str, version: int) -> str:
    """The rows of a view; its facts are beside it with the suffix ``.json``."""
    return f"views/{name}/v{version:04d}.parquet"


def manifest_path(version: int, suffix: str) -> str:
    """A sealed manifest (``suffix`` ``parquet``) or its facts (``json``)."""
    return f"_manifest/v{version:06d}.{suffix}"


def ordinal_of(path: str) -> int:
    """Number of the unit that a table beside the shards belongs to; -1 for other paths."""
    match = _ORDINAL.search(path)
    return int(match[1]) if match else -1


def to_json(values: Mapping[str, Any]) -> bytes:
    """The one way a document is written: sorted keys, UTF-8, a newline at its end."""
    return (json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def to_parquet(table: pa.Table, metadata: Mapping[str, str] | None = None) -> bytes:
    """The one way a table is written: the same rows and metadata give the same bytes (one pyarrow version).

    Args:
        table: the rows.
        metadata: goes into the footer beside ``schema_version``.
    """
    footer = {"schema_version": str(SCHEMA_VERSION), **(metadata or {})}
    table = table.combine_chunks().replace_schema_metadata(dict(sorted(footer.items())))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", version="2.6", row_group_size=1 << 17)
    return buffer.getvalue()


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Inverse of ``to_parquet``; ``columns`` limits what is decoded."""
    # No threads: one that still lets go of ``data`` while the interpreter ends aborts the process (SIGABRT,
    # whatever the job's exit code). ``read_table`` has them even with use_threads=False.
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(columns=columns, use_threads=False)


def sha256_hex(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()
