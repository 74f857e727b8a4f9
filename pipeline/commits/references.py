"""Which objects of a corpus are named by a document that counts; the rest are orphans."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.commits.manifest import Manifest, manifest_version
from pipeline.documents import in_threads, objects_of, read_as_written, read_document
from pipeline.layout import SUCCESS, ObjectRef, manifest_path
from pipeline.storage import Entry, Storage

PAYLOAD = ("shards/", "samples/", "scores/", "codes/", "labels/", "hashes/", "dedup/")
"""Prefixes whose objects exist only because a document names them under ``objects``."""

_DOCUMENTS = ("_plan/", "_commits/", "scores/", "labels/", "calibrations/", "views/", "codes/", "hashes/", "dedup/")


@dataclass(frozen=True)
class Reference:
    """An object, and the document that names it."""

    ref: ObjectRef
    document: str


def read_documents(storage: Storage, entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Path -> content of every plan, commit record, index, calibration and view of a corpus.

    Raises:
        VerificationError: one is no JSON object, or not in the form that documents are written in.
    """
    paths = [entry.path for entry in entries if entry.path.endswith(".json") and entry.path.startswith(_DOCUMENTS)]
    return dict(zip(paths, in_threads(lambda path: read_as_written(storage, path), paths), strict=True))


def read_manifests(storage: Storage, entries: Iterable[Entry]) -> dict[str, Manifest]:
    """Path -> every manifest that was ever sealed.

    Raises:
        VerificationError: one is damaged.
    """
    present = {entry.path for entry in entries}
    sealed = read_document(storage, SUCCESS).get("version") if SUCCESS in present else None
    found = {}
    for path in sorted(present):
        if path.startswith("_manifest/") and path.endswith(".json"):
            whole = path.removesuffix(".json") + ".parquet" in present
            if whole or path == manifest_path(sealed or 0, "json"):  # else the claim of an interrupted seal
                found[path] = manifest_version(storage, path)
    return found


def references(documents: Mapping[str, Mapping[str, Any]], manifests: Mapping[str, Manifest]) -> list[Reference]:
    """What the documents and every sealed manifest name.

    Raises:
        VerificationError: a document is damaged.
    """
    found = [Reference(ref, path) for path, values in documents.items() for ref in objects_of(path, values)]
    for path, manifest in manifests.items():
        found += [Reference(ref, path) for unit in manifest.units for ref in unit.objects]
    return found


def orphans(entries: Iterable[Entry], named: Iterable[Reference]) -> list[Entry]:
    """Payload that nothing names: left by attempts that crashed or lost."""
    known = {item.ref.path for item in named}
    paths = {entry.path for entry in entries}
    return [
        entry
        for entry in entries
        if entry.path.startswith(PAYLOAD) and entry.path not in known and not entry.path.endswith(".json")
    ] + [entry for entry in entries if is_unfinished_view(entry.path, paths)]


def is_unfinished_view(path: str, present: Container[str]) -> bool:
    """Whether these are rows of a view whose facts, which are written after them, are not there."""
    facts = path.removesuffix(".parquet") + ".json"
    return path.startswith("views/") and path.endswith(".parquet") and facts not in present
