"""What has to hold after every fault: while a corpus is unfinished, and once it is sealed."""

import json
import re

from pipeline import layout
from pipeline.gc import GcConfig, GcResult, gc
from pipeline.layout import sha256_hex
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify

Files = dict[str, bytes]

_DIGEST = re.compile(r"-([0-9a-f]{12})\.(?:tar|parquet)$")


def files(corpus: Storage) -> Files:
    """Every object that a listing shows."""
    return {entry.path: corpus.read(entry.path) for entry in corpus.list()}


def require(holds: bool, otherwise: str) -> None:
    """Fails with one line: pytest would spell out whole corpora."""
    assert holds, otherwise


def require_whole(corpus: Storage) -> Files:
    """Objects appear whole or not at all, records after what they name, and a seal is true."""
    found = files(corpus)
    for path, data in found.items():
        digest = _DIGEST.search(path)
        require(digest is None or sha256_hex(data).startswith(digest[1]), f"{path} is not whole")
        if path.endswith(".json"):
            for ref in json.loads(data).get("objects", ()):
                require(ref["path"] in found, f"{path} names {ref['path']}, which is not there")
                held = sha256_hex(found[ref["path"]])
                require(held == ref["sha256"], f"{ref['path']} is not what {path} says")
    if layout.SUCCESS in found:
        verify(VerifyConfig(corpus=corpus.url, workers=0))
    return found


def require_grown(before: Files, after: Files) -> None:
    """Nothing that was committed has gone or changed."""
    for path in before:
        if path.startswith(("_plan/", "_commits/", "shards/", "samples/")):
            require(before[path] == after.get(path), f"{path} is not what it was")


def require_finished(corpus: Storage, expected: Files) -> GcResult:
    """The corpus is ``expected`` byte for byte, and what there is besides is what gc sees.

    Returns:
        What gc removed.
    """
    found = files(corpus)
    different = [path for path in expected if found.get(path) != expected[path]]
    require(not different, f"other bytes than those of a quiet run: {different}")
    besides = {path: len(found[path]) for path in found.keys() - expected.keys()}
    orphans = sum(size for path, size in besides.items() if not path.startswith(layout.PROBE_PREFIX))
    require(verify(VerifyConfig(corpus=corpus.url, workers=0)).orphan_bytes == orphans, f"no orphans: {besides}")
    removed = gc(GcConfig(corpus=corpus.url, grace_hours=0.0, dry_run=False))
    require(removed.orphans == len(besides), f"gc saw {removed.orphans} of {list(besides)}")
    require(files(corpus) == expected and corpus.unfinished() == [], "gc left something, or took too much")
    return removed
