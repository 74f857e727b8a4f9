"""Find exact and near duplicates: clusters of samples, and which one of each is kept.

Hashes are made once per unit and policy; clusters are joined anew for each name. A cluster's id is its smallest
key, so the same samples and settings give the same tables on any number of workers.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from iqpir.config import digest
from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy
from pipeline.commits.manifest import ManifestUnit
from pipeline.commits.units import SchedulingConfig
from pipeline.corpus import Corpus
from pipeline.documents import in_threads, write_document
from pipeline.duplicates.clusters import Rows
from pipeline.duplicates.hashes import hash_corpus
from pipeline.duplicates.samples import Keys, LikenessPolicy, join_samples, loaded_hashes
from pipeline.label import NAME, labels_facts, read_label_index, read_labels
from pipeline.layout import DEDUP, ObjectRef, dedup_index_path, dedup_path
from pipeline.scoring.tables import read_table

log = logging.getLogger(__name__)

Keep = Literal["best", "first", "all"]


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which corpus, what counts as a duplicate, and which one stays."""

    corpus: str
    """Folder or URL of a sealed corpus."""
    name: str = "default"
    """Of the result; jobs/curate.py takes it as --dedup."""
    keep: Keep = "best"
    """Of each cluster: best (highest quality, then most pixels), first (smallest key), or all."""
    labels: str = "default"
    """Labels whose quality decides what is best."""
    likeness: LikenessPolicy = field(default_factory=LikenessPolicy)
    """What counts as a duplicate."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    """How many units are hashed at a time, and where."""

    def __post_init__(self) -> None:
        if not NAME.match(self.name):
            raise UsageError(f"name {self.name!r} may hold letters, digits, '_', '.' and '-' only.")


@dataclass(frozen=True)
class DedupResult:
    """What was found."""

    corpus: str
    name: str
    digest: str
    samples: int
    clusters: int
    """Clusters of two samples or more."""
    clustered: int
    """Samples in them."""
    largest: int
    duplicates: int
    """Samples that another one stands for; 0 with --keep all."""
    matches: dict[str, int]
    """Samples by what ties them to the kept one: bytes, pixels, perceptual."""
    unhashed: int
    """Samples that the pixel policy refuses; they are compared by their bytes only."""
    flat: int
    """Samples with too little contrast for a perceptual hash."""


def dedup(config: DedupConfig) -> DedupResult:
    """Find near-duplicates and store which sample stands for which. Nothing is removed.

    Raises:
        UsageError: nothing is sealed, no labels, or the name is taken by another result.
        IncompleteError: units are left to hash; the same command goes on.
    """
    corpus = Corpus(config.corpus)
    labels = read_label_index(corpus, config.labels) if config.keep == "best" else None
    fingerprint = hash_corpus(corpus, config.pixels, config.scheduling)
    with loaded_hashes(corpus, fingerprint) as samples:
        roots, equal_bytes, equal_pixels = join_samples(samples, config.likeness)
        keys = samples.keys
        flat = int((np.nan_to_num(samples.contrast, nan=np.inf) < config.likeness.min_contrast).sum())
        unhashed = int(np.isnan(samples.contrast).sum())
    kept = roots if config.keep != "best" else _best(corpus, keys, roots, labels or {})
    match = _matches(kept, equal_bytes, equal_pixels)
    sizes = np.bincount(roots, minlength=len(roots))[roots]
    table = pa.table(
        {
            "key": _text(keys),
            "cluster": _text(keys[roots]),
            "cluster_size": pa.array(sizes.astype(np.int32)),
            "duplicate_of": pc.if_else(pa.array(_stays(kept, config.keep)), None, _text(keys[kept])),
            "match": pa.array(match.tolist(), pa.string()),
        },
        schema=DEDUP,
    )
    rows: dict[str, Any] = {
        "samples": len(keys),
        "clusters": int((sizes[roots == np.arange(len(roots))] > 1).sum()),
        "clustered": int((sizes > 1).sum()),
        "largest": int(sizes.max(initial=0)),
        "duplicates": int((~_stays(kept, config.keep)).sum()),
        "matches": {name: int((match == name).sum()) for name in ("bytes", "pixels", "perceptual")},
        "unhashed": unhashed,
        "flat": flat,
    }
    index = _write(
        corpus, config, {**rows, "hashes": fingerprint, **(labels_facts(labels) if labels else {})}, table, keys
    )
    return DedupResult(corpus=corpus.storage.url, name=config.name, digest=str(index["digest"]), **rows)


def read_dedup(corpus: Corpus, name: str) -> tuple[dict[str, Any], pa.Table]:
    """How the duplicates called ``name`` were found, and a row per sample (``DEDUP``).

    Raises:
        UsageError: there are none, or the corpus has other samples since.
        VerificationError: a table is not what the index says.
    """
    index = read_dedup_index(corpus, name)
    tables = in_threads(lambda reference: read_table(corpus, reference), index["objects"])
    return index, pa.concat_tables(tables) if tables else DEDUP.empty_table()


def read_dedup_index(corpus: Corpus, name: str) -> dict[str, Any]:
    """How the duplicates called ``name`` were found, and their tables (``DEDUP``), one a unit.

    Raises:
        UsageError: there are none, or the corpus has other samples since.
    """
    try:
        index: dict[str, Any] = json.loads(corpus.storage.read(dedup_index_path(name)))
    except FileNotFoundError as error:
        corpus.manifest()  # where there is no corpus, that is the first thing to say
        known = sorted({entry.path.split("/")[1] for entry in corpus.storage.list("dedup")})
        raise UsageError(
            f"The corpus {corpus.storage.url} has no duplicates {name!r}.",
            f"Known: {', '.join(known) or 'none'}; jobs/dedup.py finds them.",
        ) from error
    if index["manifest"] != corpus.manifest().digest:
        raise UsageError(
            f"The duplicates {name} are of another state of the corpus (manifest {index['manifest'][:12]}).",
            "Run jobs/dedup.py again, under another name: samples that came later have no cluster.",
        )
    return index


def _best(corpus: Corpus, keys: Keys, roots: Rows, labels: Mapping[str, Any]) -> Rows:
    """Row of the sample of highest quality in each row's cluster; ties go by pixels, then by key."""
    labelled, facts = read_labels(corpus, labels), corpus.samples(["key", "width", "height"])
    quality = _aligned(keys, labelled["key"], labelled["quality"].to_numpy(zero_copy_only=False))
    sides = [facts[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("width", "height")]
    pixels = _aligned(keys, facts["key"], sides[0] * sides[1])
    order = np.lexsort((np.arange(len(keys)), -pixels, -np.nan_to_num(quality, nan=-1.0), roots))
    winners = np.empty(len(keys), np.int64)
    ordered = roots[order]
    winners[ordered[::-1]] = order[::-1]  # the first of each cluster is written last
    return winners[roots]


def _aligned(keys: Keys, names: pa.ChunkedArray, values: NDArray[Any]) -> NDArray[np.float64]:
    """``values`` of the samples called ``names``, in the order of the sorted ``keys``; NaN where there is none."""
    found = np.full(len(keys), np.nan)
    wanted = np.array(names.to_pylist(), "S32")
    place = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    known = keys[place] == wanted
    found[place[known]] = values[known]
    return found


def _matches(kept: Rows, equal_bytes: Rows, equal_pixels: Rows) -> NDArray[np.object_]:
    """What ties each row to the kept one: bytes, pixels or perceptual; None for that one itself."""
    match = np.full(len(kept), "perceptual", object)
    match[equal_pixels == equal_pixels[kept]] = "pixels"
    match[equal_bytes == equal_bytes[kept]] = "bytes"
    match[kept == np.arange(len(kept))] = None
    return match


def _stays(kept: Rows, keep: Keep) -> NDArray[np.bool_]:
    return np.full(len(kept), True) if keep == "all" else np.asarray(kept == np.arange(len(kept)))


def _text(keys: Keys) -> pa.Array:
    return pa.array(keys, pa.binary()).cast(pa.string())


def _write(
    corpus: Corpus, config: DedupConfig, facts: Mapping[str, Any], table: pa.Table, keys: Keys
) -> dict[str, Any]:
    """Store one table per unit, then the index; returns the index.

    Raises:
        UsageError: the name is taken by another result.
    """

    def store(unit: ManifestUnit) -> ObjectRef:
        wanted = np.array(corpus.unit_samples(unit, ["key"])["key"].to_pylist(), keys.dtype)
        rows = np.searchsorted(keys, wanted)
        return corpus.publish_table(
            table.take(pa.array(rows)),
            lambda sha256: dedup_path(config.name, unit.ordinal, sha256),
            {"dedup": config.name, "hashes": str(facts["hashes"])},
        )

    index = {
        **facts,
        "name": config.name,
        "keep": config.keep,
        "likeness": asdict(config.likeness),
        "manifest": corpus.manifest().digest,
        "objects": [reference.to_dict() for reference in in_threads(store, corpus.manifest().units)],
    }
    stored = write_document(corpus.storage, dedup_index_path(config.name), {**index, "digest": digest(index)})
    if stored["digest"] != digest(index):
        raise UsageError(
            f"The corpus has other duplicates called {config.name} (of other samples, labels or settings).",
            "Choose another name.",
        )
    return stored
