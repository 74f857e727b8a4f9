"""Commit records: the one truth about which piece of work is done.

Execution is at least once, the effect exactly once: a unit's payload is stored under names that carry their
sha256, then its commit record is created where there is none. A second attempt adopts the record of the
first; its own objects are orphans, which no reader sees and ``jobs/gc.py`` removes later.

No record is ever changed. Work that is done again on purpose has a further record, numbered; the last one counts.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from iqpir.errors import VerificationError
from pipeline.documents import in_threads, read_document, stamped, unstamped
from pipeline.layout import commit_name, commit_prefix, parse_commit_name, sha256_hex, to_json
from pipeline.storage import Storage

log = logging.getLogger(__name__)

Record = dict[str, Any]


class Finished(Mapping[str, Record]):
    """Commit records of one step by unit id; whether a unit is in costs nothing, records are read when asked.

    Args:
        storage: the corpus.
        step: such as ``shard`` or ``score/niqe``.
        fingerprint: of the configuration.
    """

    def __init__(self, storage: Storage, step: str, fingerprint: str) -> None:
        self._storage = storage
        self._records: dict[str, Record] = {}
        self._paths: dict[str, str] = {}
        retries: dict[str, int] = {}
        prefix = commit_prefix(step, fingerprint)
        for entry in storage.list(prefix):
            name = entry.path[len(prefix) + 1 :].removesuffix(".json")
            name, _, attempt = name.partition("/")
            unit_id, retry = parse_commit_name(name)
            # <unit>.json, or <unit>/<sha12>.json on stores without conditions: there the smallest name wins.
            if retry > retries.get(unit_id, -1) or (retry == retries[unit_id] and not attempt):
                self._paths[unit_id], retries[unit_id] = entry.path, retry

    def __contains__(self, unit_id: object) -> bool:
        return unit_id in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, unit_id: str) -> Record:
        if unit_id not in self._records:
            self._records[unit_id] = self._read(unit_id)
        return self._records[unit_id]

    def load(self, unit_ids: Iterable[str]) -> dict[str, Record]:
        """The records of these units, read concurrently."""
        wanted = list(unit_ids)
        missing = [unit_id for unit_id in wanted if unit_id not in self._records]
        self._records.update(zip(missing, in_threads(self._read, missing), strict=True))
        return {unit_id: self._records[unit_id] for unit_id in wanted}

    def _read(self, unit_id: str) -> Record:
        record = read_document(self._storage, self._paths[unit_id])
        if record.get("unit_id") != unit_id:
            raise VerificationError(f"{self._storage.uri(self._paths[unit_id])} is the commit record of another unit.")
        return record


def finished(storage: Storage, step: str, fingerprint: str) -> Finished:
    """Commit records of a step, found by one listing."""
    return Finished(storage, step, fingerprint)


def commit(
    storage: Storage, step: str, fingerprint: str, unit_id: str, record: Mapping[str, Any], retry: int = 0
) -> Record:
    """Make a unit's work count; its payload must be stored already.

    Args:
        storage: the corpus.
        step: such as ``shard`` or ``score/niqe``.
        fingerprint: of the configuration.
        unit_id: the unit.
        record: JSON values; ``objects`` lists the payload (``ObjectRef.to_dict``) for verify and gc. Without
            times, hosts or attempt numbers: equal work makes equal records.
        retry: 0, or that of the record which this one takes the place of, plus one.

    Returns:
        The record that counts: this one, or that of an earlier attempt.
    """
    numbered = {"retry": retry} if retry else {}
    values = stamped({**record, **numbered, "step": step, "fingerprint": fingerprint, "unit_id": unit_id})
    data, place = to_json(values), f"{commit_prefix(step, fingerprint)}/{commit_name(unit_id, retry)}"
    if not storage.conditional:
        storage.publish(f"{place}/{sha256_hex(data)[:12]}.json", data)
        smallest = storage.list(place)[0].path
        return read_document(storage, smallest)
    winner: Record = json.loads(storage.create(f"{place}.json", data))
    if unstamped(winner) != unstamped(values):
        log.warning("unit %s of %s was committed by another attempt, with other content", unit_id, step)
    return winner
