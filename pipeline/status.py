"""The verb ``status``: what of a corpus is planned, done, sealed, and what is missing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from iqpir.config import digest
from iqpir.errors import UsageError, VerificationError
from pipeline.commits.manifest import Manifest, read_manifest
from pipeline.commits.plan import Generation, read_generations
from pipeline.commits.records import finished
from pipeline.layout import parse_commit_name
from pipeline.storage import Storage


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Which corpus."""

    corpus: str
    """Folder or URL of the corpus."""


@dataclass(frozen=True, kw_only=True)
class StatusResult:
    """State of a corpus."""

    corpus: str
    collections: dict[str, int]
    """Planned inputs by collection, changed ones counted each time."""
    units: int
    """Units planned."""
    done: int
    """Units committed."""
    missing: list[int]
    """Ordinals of the units that are not committed; ``jobs/shard.py`` goes on with them."""
    sealed: int
    """Version of the manifest; 0 if there is none."""
    current: bool
    """Whether that manifest has every planned unit."""
    manifest: str
    """Its sha256."""
    totals: dict[str, Any] = field(default_factory=dict)
    """Its counts: inputs, success, rejected, failed, samples, and inputs by status."""
    steps: dict[str, int] = field(default_factory=dict)
    """Commit records by step and fingerprint, such as ``score/niqe/0f3a...``."""
    views: list[str] = field(default_factory=list)
    note: str = ""
    """What is wrong with the manifest, if it cannot be read."""


def status(config: StatusConfig) -> StatusResult:
    """Say what of a corpus is done, and what is missing.

    Raises:
        UsageError: there is no corpus.
        VerificationError: the plan is damaged.
    """
    storage = Storage.open(config.corpus)
    generations = read_generations(storage)
    if not generations:
        raise UsageError(f"There is no corpus at {storage.url}.", "jobs/shard.py makes one.")
    records = finished(storage, "shard", digest(generations[0].facts["settings"]))
    planned = {unit_id: ordinal for item in generations for unit_id, ordinal in item.unit_ids().items()}
    manifest, note = _manifest(storage)
    names = ("inputs", "success", "rejected", "failed", "samples", "statuses")
    return StatusResult(
        corpus=storage.url,
        collections=_collections(generations),
        units=len(planned),
        done=sum(unit_id in records for unit_id in planned),
        missing=sorted(ordinal for unit_id, ordinal in planned.items() if unit_id not in records),
        sealed=manifest.version if manifest else 0,
        current=manifest is not None and {unit.unit_id for unit in manifest.units} == planned.keys(),
        manifest=manifest.digest if manifest else "",
        totals={name: manifest.facts[name] for name in names} if manifest else {},
        steps=_steps(storage),
        views=[entry.path for entry in storage.list("views") if entry.path.endswith(".json")],
        note=note,
    )


def _manifest(storage: Storage) -> tuple[Manifest | None, str]:
    try:
        return read_manifest(storage), ""
    except UsageError:
        return None, "not sealed yet"
    except VerificationError as error:
        return None, str(error)


def _collections(generations: Sequence[Generation]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for generation in generations:
        counts[generation.collection] += generation.facts["inputs"]
    return dict(counts)


def _steps(storage: Storage) -> dict[str, int]:
    """Units with a record, by step and fingerprint (each has one folder of records or of attempts)."""
    units: dict[str, set[str]] = {}
    for entry in storage.list("_commits"):
        *step, last = entry.path.removeprefix("_commits/").removesuffix(".json").split("/")
        if len(parse_commit_name(step[-1])[0]) == 32:  # <unit>/<attempt>.json, on stores without conditions
            last = step.pop()
        units.setdefault("/".join(step), set()).add(parse_commit_name(last)[0])
    return {step: len(found) for step, found in sorted(units.items())}
