"""Which objects of a corpus are named by a document that counts; the rest are orphans."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.commits.manifest import manifest_version
from pipeline.documents import in_threads, objects_of, read_document
from pipeline.layout import SUCCESS, ObjectRef, manifest_path
from pipeline.storage import Entry, Storage

PAYLOAD = ("shards/", "samples/", "scores/", "codes/", "labels/", "hashes/", "dedup/")
"""Prefixes whose objects exist only because a document names them under ``objects``."""

_DOCUMENTS = ("_plan/", "_commits/", "labels/", "calibrations/", "views/", "codes/", "dedup/")


@dataclass(frozen=True)
class Reference:
    """An object, and the document that names it."""

    ref: ObjectRef
    document: str


def read_documents(storage: Storage, entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Path -> content of every plan, commit record, index and view of a corpus.

    Raises:
        VerificationError: one is no JSON object.
    """
    paths = [entry.path for entry in entries if entry.path.endswith(".json") and entry.path.startswith(_DOCUMENTS)]
    return dict(zip(paths, in_threads(lambda path: read_document(storage, path), paths), strict=True))


def references(
    storage: Storage, entries: Iterable[Entry], documents: Mapping[str, Mapping[str, Any]]
) -> list[Reference]:
    """What the documents and every sealed manifest name.

    Raises:
        VerificationError: a document or a manifest is damaged.
    """
    found = [Reference(ref, path) for path, values in documents.items() for ref in objects_of(path, values)]
    present = {entry.path for entry in entries}
    sealed = read_document(storage, SUCCESS).get("version") if SUCCESS in present else None
    for path in sorted(present):
        if path.startswith("_manifest/") and path.endswith(".json"):
            whole = path.removesuffix(".json") + ".parquet" in present
            if not whole and path != manifest_path(sealed or 0, "json"):
                continue  # the claim of an interrupted seal; the commit records name its objects too
            units = manifest_version(storage, path).units
            found += [Reference(ref, path) for unit in units for ref in unit.objects]
    return found


def orphans(entries: Iterable[Entry], named: Iterable[Reference]) -> list[Entry]:
    """Payload that nothing names: left by attempts that crashed or lost."""
    known = {item.ref.path for item in named}
    return [
        entry
        for entry in entries
        if entry.path.startswith(PAYLOAD) and entry.path not in known and not entry.path.endswith(".json")
    ]
