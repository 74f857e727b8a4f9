"""What ``verify`` asks of documents alone: each is what its own digest says, and what it was made from is there.

A view names labels and duplicates, labels name a calibration and scores, duplicates name hashes; each of them, and
each unit's record of each of these steps, has to be there. Lies are values.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from iqpir.config import digest
from pipeline.commits.manifest import Manifest, ManifestUnit
from pipeline.commits.references import is_unfinished_view
from pipeline.documents import is_as_stamped, objects_of, unstamped
from pipeline.layout import (
    calibration_path,
    commit_name,
    commit_prefix,
    dedup_index_path,
    labels_index_path,
    metric_facts_path,
    ordinal_of,
)
from pipeline.storage import Storage

Document = Mapping[str, Any]
Documents = Mapping[str, Document]
Step = tuple[str, str]
"""Name of a step, and fingerprint."""

_ATTEMPT = ("step", "fingerprint", "unit_id", "retry")
_MAPS = ("metrics", "fingerprints", "consensus")


def content_lies(documents: Documents) -> Iterator[str]:
    """Documents that are not what the digests in them say."""
    for path, values in documents.items():
        if path.startswith("_plan/"):
            continue  # the manifest has its sha256
        own = next((check for prefix, check in _OWN_DIGESTS.items() if path.startswith(prefix)), None)
        if not is_as_stamped(values) or (own is not None and not own(path, values)):
            yield f"{path}: its content is not what its digest says"


def _index_holds(path: str, values: Document) -> bool:
    """Of labels and of duplicates."""
    return values.get("digest") == digest({name: value for name, value in values.items() if name != "digest"})


def _calibration_holds(path: str, values: Document) -> bool:
    return path == calibration_path(str(values.get("name"))) and values.get("digest") == digest(
        {name: values.get(name) for name in _MAPS}
    )


def _metric_holds(path: str, values: Document) -> bool:
    """The fingerprint of scores is the digest of everything that decides them."""
    facts = {name: value for name, value in unstamped(values).items() if name not in ("fingerprint", "pixel_policy")}
    fingerprint = str(values.get("fingerprint"))
    return digest(facts) == fingerprint and path.split("/")[2] == fingerprint


_OWN_DIGESTS: dict[str, Callable[[str, Document], bool]] = {
    "labels/": _index_holds,
    "dedup/": _index_holds,
    "calibrations/": _calibration_holds,
    "scores/": _metric_holds,
}


@dataclass(frozen=True)
class Lineage:
    """The documents of a corpus, and what each was made from.

    Attributes:
        documents: path -> content.
        manifest: the sealed one.
        manifests: path -> every manifest that was ever sealed.
    """

    documents: Documents
    manifest: Manifest
    manifests: Mapping[str, Manifest]

    def lies(self) -> Iterator[str]:
        """Documents and records that others were made from and that are missing, or are other ones."""
        done = self._records()
        units = self.manifest.units
        shards: Step = "shard", digest(self.manifest.facts["settings"])
        yield from _unrecorded(shards, units, done, "the manifest")
        yield from self._attempts()
        for name, fingerprint in done:
            facts = metric_facts_path(name.removeprefix("score-"), fingerprint)
            if name.startswith("score-") and facts not in self.documents:
                yield f"{facts}: is missing, records of {name} need it"
        for path, values in self.documents.items():
            made = _MADE.get(path.split("/")[0])
            if made is None:
                continue
            yield from self._parents(path, values)
            objects = objects_of(path, values)
            there = {ordinal_of(ref.path) for ref in objects}
            for step in made(values):
                yield from _unrecorded(step, [unit for unit in units if unit.ordinal in there], done, path)

    def unfinished(self) -> dict[str, int]:
        """``<step>/<fingerprint>`` of steps that have records of some units -> how many have none."""
        total = len(self.manifest.units)
        known = {unit.unit_id for unit in self.manifest.units}
        counts = {"/".join(step): total - len(found & known) for step, found in self._records().items()}
        return {step: left for step, left in sorted(counts.items()) if left}

    def _attempts(self) -> Iterator[str]:
        """A unit that was done again keeps its record of before, and that of which labels were made."""
        records = [values for path, values in self.documents.items() if path.startswith("_commits/")]
        there = {tuple(str(values.get(name, 0)) for name in _ATTEMPT) for values in records}
        wanted = {(*attempt[:3], str(former)): "done again" for attempt in there for former in range(int(attempt[3]))}
        for path, values in self.documents.items():
            for unit_id, metrics in values.get("retries", {}).items():
                for metric, retry in metrics.items():
                    fingerprint = values.get("metrics", {}).get(metric)
                    wanted[f"score-{metric}", str(fingerprint), unit_id, str(retry)] = f"labelled in {path}"
        for attempt in sorted(wanted.keys() - there):
            record = f"{commit_prefix(*attempt[:2])}/{commit_name(attempt[2], int(attempt[3]))}.json"
            yield f"{record}: is missing, the unit was {wanted[attempt]} after it"

    def _records(self) -> dict[Step, set[str]]:
        found: dict[Step, set[str]] = {}
        for path, values in self.documents.items():
            if path.startswith("_commits/"):
                step = str(values.get("step")), str(values.get("fingerprint"))
                found.setdefault(step, set()).add(str(values.get("unit_id")))
        return found

    def _parents(self, path: str, values: Document) -> Iterator[str]:
        labels = labels_index_path(str(values.get("labels")), int(values.get("labels_version", 1)))
        grown = labels_index_path(str(values.get("name")), int(values.get("version", 1)) - 1)
        wanted = [(labels, values.get("labels_digest")), (grown, values.get("grown_from"))]
        wanted.append((dedup_index_path(str(values.get("dedup"))), values.get("dedup_digest")))
        wanted.append((calibration_path(str(values.get("calibration_name"))), values.get("calibration")))
        for parent, expected in wanted:
            found = self.documents.get(parent)
            if expected is not None and found is None:
                yield f"{parent}: is missing, {path} was made from it"
            elif expected is not None and found is not None and found.get("digest") != expected:
                yield f"{parent}: is another one than {path} was made from"
        if values.get("manifest") not in {found.digest for found in self.manifests.values()}:
            yield f"{path}: was made from a manifest that is not here"


def _unrecorded(
    step: Step, units: Iterable[ManifestUnit], done: Mapping[Step, set[str]], document: str
) -> Iterator[str]:
    for unit in units:
        if unit.unit_id not in done.get(step, ()):
            yield f"{commit_prefix(*step)}/{unit.unit_id}.json: is missing, {document} was made from it"


def _steps_of_labels(values: Document) -> list[Step]:
    metrics: Mapping[str, str] = values.get("metrics", {})
    return [(f"score-{metric}", str(fingerprint)) for metric, fingerprint in metrics.items()]


def _steps_of_duplicates(values: Document) -> list[Step]:
    return [("hash", str(values.get("hashes")))]


_MADE: dict[str, Callable[[Document], list[Step]]] = {
    "labels": _steps_of_labels,
    "dedup": _steps_of_duplicates,
    "views": lambda values: [],
}
"""Folder of documents that are made from others -> steps whose records each of them rests on."""


def view_lies(storage: Storage, present: set[str]) -> Iterator[str]:
    """Rows of views without the facts that say what they are."""
    for path in sorted(present):
        facts = path.removesuffix(".parquet") + ".json"
        if is_unfinished_view(path, present) and not storage.exists(facts):  # curate may have written them just now
            yield f"{facts}: is missing, {path} has its rows (after a death of curate jobs/gc.py removes them)"
