"""The verb ``verify``: prove that a sealed corpus is what its manifest, plan and records say."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from iqpir.errors import IncompleteError, VerificationError
from pipeline import layout
from pipeline.commits.checks import (
    document_lies,
    former_lies,
    manifest_lies,
    plan_lies,
    record_lies,
    reference_lies,
)
from pipeline.commits.lineage import Lineage, content_lies, view_lies
from pipeline.commits.manifest import Manifest, ManifestUnit
from pipeline.commits.plan import Generation, read_generations
from pipeline.commits.prove import Claim, Keys, Proof, Prover, relpaths_digest
from pipeline.commits.references import Reference, orphans, read_documents, read_manifests, references
from pipeline.commits.units import SchedulingConfig, schedule
from pipeline.corpus import Corpus
from pipeline.documents import read_document

log = logging.getLogger(__name__)

LOGGED_LIES = 50
SIDECARS = ("scores/", "codes/", "labels/", "hashes/", "dedup/")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What is proved, and how thoroughly."""

    corpus: str
    """Folder or URL of the corpus."""
    deep: bool = True
    """Read and hash every object; else documents, sizes and counts are compared, and no payload is read."""
    workers: int = 1
    """Units worked on at a time; as in jobs/shard.py."""


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was proved. There is no result for a corpus with a lie: that is an error."""

    corpus: str
    version: int
    manifest: str
    deep: bool
    units: int
    inputs: int
    samples: int
    objects: int
    """Objects that a document names."""
    bytes: int
    pending_units: int
    """Units planned after the last seal; no lie."""
    unfinished: dict[str, int]
    """Steps that have done some units and not all: step/fingerprint -> units without a record; no lie, unless labels
    or duplicates were made from it."""
    orphans: int
    """Objects that nothing names: left by crashed attempts, no lie; ``jobs/gc.py`` removes them."""
    orphan_bytes: int
    seconds: float


def verify(config: VerifyConfig) -> VerifyResult:
    """Prove that a corpus is what its records say; exit code 4 if it is not.

    Checks the manifest against ``_SUCCESS``, plan and totals; each object's size and sha256; each tar's
    members, offsets and contents against its rows; that no key occurs twice; that scores, codes and labels
    have a row for every sample; the digests of views; and of every document its own digest, and that what it was
    made from is there.

    Raises:
        UsageError: nothing is sealed there.
        VerificationError: names the first lie and how many there are.
        IncompleteError: no lie so far, and the storage failed or the run was stopped.
    """
    began = time.monotonic()
    corpus = Corpus(config.corpus)
    storage, manifest = corpus.storage, corpus.manifest()
    generations, entries = read_generations(storage), storage.list()
    documents, manifests = read_documents(storage, entries), read_manifests(storage, entries)
    lineage = Lineage(documents, manifest, manifests)
    present = {entry.path for entry in entries}
    named = references(documents, manifests)
    lies = [
        *plan_lies(generations),
        *manifest_lies(manifest, generations),
        *former_lies(read_document(storage, layout.SUCCESS), manifests),
        *record_lies(documents, manifest),
        *document_lies(storage, documents, manifest, present),
        *reference_lies(named, entries),
        *content_lies(documents),
        *lineage.lies(),
        *view_lies(storage, present),
    ]
    failure = ""
    if config.deep:
        broken = {lie.partition(":")[0] for lie in lies}
        claims = _claims(manifest, generations, named, broken)
        proofs, failure = _prove(Prover(storage), claims, config.workers)
        lies += _deep_lies(proofs, manifest)
    if lies:
        for lie in lies[:LOGGED_LIES]:
            log.error("%s", lie)
        raise VerificationError(
            f"{storage.url} is not what its records say: {lies[0]} ({len(lies)} such findings).",
            "Restore the object, or remove its unit's commit record and run the job again.",
        )
    if failure:
        raise IncompleteError(f"{storage.url} could not be read to its end ({failure}).", "Run again.")
    unnamed = orphans(entries, named)
    sizes = {item.ref.path: item.ref.bytes for item in named}
    return VerifyResult(
        corpus=storage.url,
        version=manifest.version,
        manifest=manifest.digest,
        deep=config.deep,
        units=len(manifest.units),
        inputs=int(manifest.facts["inputs"]),
        samples=manifest.samples,
        objects=len(sizes),
        bytes=sum(sizes.values()),
        pending_units=sum(item.facts["units"] for item in generations) - len(manifest.units),
        unfinished=lineage.unfinished(),
        orphans=len(unnamed),
        orphan_bytes=sum(entry.size for entry in unnamed),
        seconds=round(time.monotonic() - began, 3),
    )


def _claims(
    manifest: Manifest,
    generations: Sequence[Generation],
    named: Sequence[Reference],
    broken: set[str],
) -> list[Claim]:
    """What the workers have to prove; objects that are known to be broken are left out."""
    planned = {
        unit.unit_id: relpaths_digest([entry.relpath for entry in unit.inputs])
        for item in generations
        for unit in item.units()
    }
    claims = [
        Claim(unit, planned.get(unit.unit_id, ""))
        for unit in manifest.units
        if not {ref.path for ref in unit.objects} & broken
    ]
    units = {unit.ordinal: unit for unit in manifest.units}
    sidecars = {item.ref.path: item.ref for item in named if item.ref.path.startswith(SIDECARS)}
    for path, ref in sorted(sidecars.items()):
        if layout.ordinal_of(path) in units and path not in broken:
            claims.append(Claim(units[layout.ordinal_of(path)], sidecar=ref))
    return claims


def _prove(prover: Prover, claims: Sequence[Claim], workers: int) -> tuple[list[tuple[Claim, Proof]], str]:
    """Proofs in the order of the claims, and why some could not be had (empty if all are there)."""
    proofs: dict[Claim, Proof] = {}
    failure = ""
    for claim, outcome in schedule(claims, prover, len(claims), "verify", SchedulingConfig(workers=workers)):
        if outcome.value is not None:
            proofs[claim] = outcome.value
        else:
            failure = failure or f"{_name(claim)}: {outcome.error}"
    if len(proofs) < len(claims) and not failure:
        failure = "interrupted"
    return [(claim, proofs[claim]) for claim in claims if claim in proofs], failure


def _deep_lies(proofs: Sequence[tuple[Claim, Proof]], manifest: Manifest) -> Iterator[str]:
    for _, proof in proofs:
        yield from proof.lies
    samples = sum(len(proof.keys) for _, proof in proofs)
    for row, (count, key) in sorted(_doubled([proof.keys for _, proof in proofs]).items()):
        yield f"{_name(proofs[row][0])}: has {count} keys of other units, such as {key}"
    units = sum(claim.sidecar is None for claim, _ in proofs)
    if units == len(manifest.units) and samples != manifest.samples:
        yield f"{layout.SUCCESS}: {manifest.samples} samples are sealed, {samples} are there"


def _doubled(units: Sequence[Keys]) -> dict[int, tuple[int, str]]:
    """Place of each unit with keys that an earlier one has -> how many, and the smallest."""
    if not units:
        return {}
    keys = np.concatenate(units)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    owner = np.repeat(np.arange(len(units)), [len(unit) for unit in units])[order]
    keys = keys[order]
    again = np.flatnonzero((keys[1:] == keys[:-1]) & (owner[1:] != owner[:-1])) + 1
    found: dict[int, tuple[int, str]] = {}
    for place in again[::-1].tolist():
        count = found.get(int(owner[place]), (0, ""))[0]
        found[int(owner[place])] = count + 1, keys[place].decode()
    return found


def _name(claim: Claim) -> str:
    unit: ManifestUnit = claim.unit
    return claim.sidecar.path if claim.sidecar is not None else unit.table
