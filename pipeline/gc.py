"""The verb ``gc``: find, and on request remove, what no manifest and no commit record names.

Recovery never deletes; this does, and only objects older than a grace period. A writer that is still at work
stores its payload before its record, so a young object may yet be named.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from iqpir.errors import UsageError
from pipeline.commits.references import orphans, read_documents, read_manifests, references
from pipeline.layout import PROBE_PREFIX
from pipeline.storage import Entry, Storage


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """What may be removed."""

    corpus: str
    """Folder or URL of the corpus."""
    dry_run: bool = True
    """Only count; --no-dry-run removes."""
    grace_hours: float = 24.0
    """Objects younger than this stay: a running job may be about to name them."""

    def __post_init__(self) -> None:
        if self.grace_hours < 0:
            raise UsageError(f"grace_hours {self.grace_hours} is negative.")


@dataclass(frozen=True, kw_only=True)
class GcResult:
    """What was found, and whether it was removed."""

    corpus: str
    dry_run: bool
    orphans: int
    """Objects older than the grace period that nothing names."""
    unfinished: int
    """Temporary files, or open multipart uploads, older than the grace period."""
    young: int
    """Such objects and files within the grace period; they stay."""
    bytes: int
    removed: int


def gc(config: GcConfig) -> GcResult:
    """Count, and with --no-dry-run remove, objects that no manifest and no commit record names.

    Raises:
        UsageError: there is no corpus.
        VerificationError: a record is damaged, so that nobody can tell what it names; nothing is removed.
    """
    storage = Storage.open(config.corpus)
    if not storage.list("_plan"):
        raise UsageError(f"There is no corpus at {storage.url}.", "Check --corpus.")
    before = time.time() - config.grace_hours * 3600
    candidates, leftovers = _unnamed(storage), storage.unfinished()
    old = [entry for entry in candidates if entry.modified < before]
    stale = [entry for entry in leftovers if entry.modified < before]
    removed = 0
    if not config.dry_run:
        removed = _remove(storage, old, before) + len(stale)
        for entry in stale:
            storage.discard(entry)
    return GcResult(
        corpus=storage.url,
        dry_run=config.dry_run,
        orphans=len(old),
        unfinished=len(stale),
        young=len(candidates) + len(leftovers) - len(old) - len(stale),
        bytes=sum(entry.size for entry in (*old, *stale)),
        removed=removed,
    )


def _unnamed(storage: Storage) -> list[Entry]:
    entries = storage.list()
    probes = [entry for entry in entries if entry.path.startswith(f"{PROBE_PREFIX}/")]
    named = references(read_documents(storage, entries), read_manifests(storage, entries))
    return orphans(entries, named) + probes


def _remove(storage: Storage, old: Sequence[Entry], before: float) -> int:
    """Remove what is still unnamed and still old.

    A writer stores the same bytes again, under the same name, before it names them: each object is looked at
    right before it goes. Should one vanish in that instant, the seal misses it and says which unit to redo.
    """
    if not old:
        return 0
    unnamed = {entry.path for entry in _unnamed(storage)}
    removed = 0
    for entry in old:
        if entry.path in unnamed and _is_older(storage, entry.path, before):
            storage.remove(entry.path)
            removed += 1
    return removed


def _is_older(storage: Storage, path: str, before: float) -> bool:
    try:
        return storage.stat(path).modified < before
    except FileNotFoundError:
        return False
