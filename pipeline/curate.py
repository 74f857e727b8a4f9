"""Choose samples by a SQL condition over their facts and labels: a view. Undoing the choice costs nothing.

The held-back split goes by the hash of the source picture, so crops of one picture never lie on both sides. With
``dedup`` it goes by groups of sources that share a cluster, so copies of one picture do not either.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from iqpir.errors import UsageError
from pipeline.commits.manifest import ManifestUnit
from pipeline.corpus import Corpus
from pipeline.dedup import read_dedup_index
from pipeline.documents import in_threads, stamped, unstamped
from pipeline.duplicates.clusters import Forest, Rows
from pipeline.label import labels_facts, read_label_index
from pipeline.layout import (
    DEDUP,
    SAMPLE_REFERENCE,
    SAMPLE_SOURCE,
    SAMPLES,
    label_schema,
    ordinal_of,
    to_json,
    to_parquet,
    view_path,
)
from pipeline.scoring.tables import read_table
from pipeline.view import view_digest

log = logging.getLogger(__name__)

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")
_ATTEMPTS = 20

Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Which samples make the view."""

    corpus: str
    """Folder or URL of a labelled corpus."""
    name: str
    """Of the view; another choice under the same name is its next version."""
    labels: str = "default"
    """Labels to choose by; their columns go into the view."""
    where: str = "true"
    """SQL condition (DuckDB), such as: quality > 0.8 and width >= 512. A wrong column name lists all."""
    dedup: str = ""
    """Duplicates to respect (jobs/dedup.py --name): clusters are never split between train and val, and the
    condition sees the columns cluster, cluster_size, duplicate_of and match. Empty: none."""
    drop_duplicates: bool = True
    """With dedup: leave out the samples that another one stands for."""
    holdout: float = 0.05
    """Share of the source pictures that is held back as the split val; 0: none."""
    seed: int = 0
    """Of the split; another seed holds back other pictures."""
    dry_run: bool = False
    """Write no view: count what would become of every input."""

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise UsageError(f"name {self.name!r} may hold letters, digits, '_', '.', '-' only.")
        if not 0.0 <= self.holdout < 1.0:
            raise UsageError(f"holdout {self.holdout} is outside [0, 1).")
        if not self.where.strip():
            raise UsageError("where is empty.", "Write true to take every labelled sample.")


@dataclass(frozen=True)
class CurateResult:
    """The view, as a reference that training takes, and its size."""

    view: str
    digest: str
    samples: int
    train: int
    val: int
    unlabelled: int
    """Samples that no condition can choose, because they have no quality."""
    duplicates: int
    """Samples with a quality that were left out because another one stands for them."""
    new: bool
    """Whether a version was written; False: the newest equal one is named."""


@dataclass(frozen=True)
class CurateCounts:
    """What would become of every input of the corpus."""

    corpus: str
    inputs: dict[str, int]
    """Rows by status: success, and each reason for which there is no sample."""
    unlabelled: int
    """Samples without a quality."""
    duplicates: int
    """Samples with a quality that another one stands for."""
    unmet: int
    """The others that the condition does not choose."""
    samples: int
    """Those that it does."""
    train: int
    val: int
    mean_quality: float | None
    """Of the chosen ones; none where there are none."""


def curate_or_count(config: CurateConfig) -> CurateResult | CurateCounts:
    """Write a view, or with ``dry_run`` count what would be in it.

    Raises:
        UsageError: as for ``curate``; but nothing that meets the condition is a count, too.
    """
    return count(config) if config.dry_run else curate(config)


def count(config: CurateConfig) -> CurateCounts:
    """What ``curate`` would do with every input; nothing is written.

    Raises:
        UsageError: a condition that is no SQL or names unknown columns.
    """
    corpus = Corpus(config.corpus)
    index, found = _parents(corpus, config)
    choice = _choose(corpus, index, found, config)
    rows = _view_rows(choice.candidates, choice.chosen, config)
    splits, statuses = Counter(rows["split"].to_pylist()), Counter[str]()
    for unit in corpus.manifest().units:
        statuses.update(corpus.rows(unit, ["status"])["status"].to_pylist())
    return CurateCounts(
        corpus=corpus.storage.url,
        inputs=dict(sorted(statuses.items())),
        unlabelled=choice.unlabelled,
        duplicates=choice.duplicates,
        unmet=choice.offered - rows.num_rows,
        samples=rows.num_rows,
        train=splits["train"],
        val=splits["val"],
        mean_quality=pc.mean(rows["quality"]).as_py(),
    )


def curate(config: CurateConfig) -> CurateResult:
    """Write a view of the samples that meet the condition; an equal one is not written again.

    Raises:
        UsageError: a condition that is no SQL or names unknown columns, or that nothing meets.
    """
    corpus = Corpus(config.corpus)
    index, found = _parents(corpus, config)
    choice = _choose(corpus, index, found, config)
    if not len(choice.chosen):
        raise UsageError(
            f"No sample meets {config.where!r}.", f"{choice.offered} have a quality; loosen the condition."
        )
    rows = _view_rows(choice.candidates, choice.chosen, config)
    val = pc.sum(pc.equal(rows["split"], "val")).as_py()
    data = to_parquet(rows)
    facts = {
        "name": config.name,
        "where": config.where,
        "holdout": config.holdout,
        "seed": config.seed,
        **labels_facts(index),
        "metrics": index["metrics"],
        "calibration": index["calibration"],
        "calibration_name": index["calibration_name"],
        "hq_threshold": index["hq_threshold"],
        "bins": index["bins"],
        "manifest": corpus.manifest().digest,
        "samples": rows.num_rows,
        "train": rows.num_rows - val,
        "val": val,
        "digest": view_digest(data),
        **_dedup_facts(config, found),
    }
    version, new = _write(corpus, facts, data)
    return CurateResult(
        view=f"{config.name}@v{version:04d}",
        digest=str(facts["digest"]),
        samples=rows.num_rows,
        train=rows.num_rows - val,
        val=val,
        unlabelled=choice.unlabelled,
        duplicates=choice.duplicates,
        new=new,
    )


def _parents(corpus: Corpus, config: CurateConfig) -> tuple[Facts, Facts]:
    """Index of the labels, and of the duplicates; that there are some which are not regarded is said."""
    index = read_label_index(corpus, config.labels)
    if config.dedup:
        return index, read_dedup_index(corpus, config.dedup)
    known = sorted({entry.path.split("/")[1] for entry in corpus.storage.list("dedup")})
    if known:
        log.info("the duplicates that were found are not regarded; --dedup %s does", " or ".join(known))
    return index, {}


@dataclass(frozen=True)
class _Choice:
    """What meets the condition, and what was left out before."""

    candidates: pa.Table
    chosen: Rows
    """Places of the candidates that meet the condition."""
    offered: int
    """Candidates that the condition saw."""
    unlabelled: int
    duplicates: int


def _choose(corpus: Corpus, labels: Facts, clusters: Facts, config: CurateConfig) -> _Choice:
    """Samples with a quality, for which no other one stands, that meet the condition."""
    candidates = labelled_samples(corpus, labels, clusters, config.where)
    offered = labelled = pc.is_valid(candidates["quality"])
    if clusters and config.drop_duplicates:
        offered = pc.and_(labelled, pc.is_null(candidates["duplicate_of"]))
    known, seen = pc.sum(labelled).as_py(), pc.sum(offered).as_py()
    chosen = meeting(candidates, config.where, offered)
    return _Choice(candidates, chosen, seen, candidates.num_rows - known, known - seen)


def _dedup_facts(config: CurateConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a view says of its duplicates; nothing where none were named, as before there were any."""
    if not config.dedup:
        return {}
    return {"dedup": config.dedup, "dedup_digest": found["digest"], "drop_duplicates": config.drop_duplicates}


def labelled_samples(corpus: Corpus, labels: Facts, clusters: Facts, where: str = "columns") -> pa.Table:
    """Every live sample with its labels and cluster, unit by unit: of ``SAMPLES`` what a view or ``where`` wants.

    Args:
        corpus: where they are.
        labels: their index.
        clusters: index of the duplicates; empty: none.
        where: a condition; all columns by default.
    """
    text = where.lower()
    names = [*SAMPLE_REFERENCE.names, *SAMPLE_SOURCE.names]
    names += [name for name in SAMPLES.names if name not in names and (name in text or "columns" in text)]
    beside = [(_by_unit(labels), label_schema(tuple(labels["metrics"])))]
    if clusters:
        beside.append((_by_unit(clusters), DEDUP))

    def read(unit: ManifestUnit) -> pa.Table:
        table = corpus.unit_samples(unit, names)
        for references, schema in beside:
            known = unit.ordinal in references
            other = read_table(corpus, references[unit.ordinal]) if known else schema.empty_table()
            place = pc.index_in(table["key"], value_set=other["key"].combine_chunks())
            for name in schema.names[1:]:
                table = table.append_column(schema.field(name), other[name].take(place))
        return table

    return pa.concat_tables(in_threads(read, corpus.manifest().units))


def _by_unit(index: Facts) -> dict[int, Mapping[str, Any]]:
    """Ordinal of a unit -> its table."""
    return {ordinal_of(reference["path"]): reference for reference in index["objects"]}


def meeting(candidates: pa.Table, where: str, offered: pa.ChunkedArray | None = None) -> Rows:
    """Places of the candidates that meet the condition, by key; it sees this table and nothing else.

    Args:
        candidates: with some columns of ``SAMPLES``, those of labels and of duplicates.
        where: the condition.
        offered: which of them it sees; None: all.

    Raises:
        UsageError: it is no condition; the message lists the columns.
    """
    labels = [name for name in candidates.column_names if name not in SAMPLES.names]
    columns = f"Columns: {', '.join([*SAMPLES.names, *labels])} (write one with a sign in double quotes)."
    numbered = candidates.append_column("place", pa.array(np.arange(candidates.num_rows)))
    numbered = numbered.append_column("offered", pa.repeat(True, len(numbered)) if offered is None else offered)
    with duckdb.connect(":memory:") as connection:
        connection.register("numbered", numbered)
        connection.execute("CREATE VIEW candidates AS SELECT * EXCLUDE (offered) FROM numbered WHERE offered")
        connection.execute("SET enable_external_access = false; SET lock_configuration = true")
        query = f"SELECT place FROM candidates WHERE (\n{where}\n)"
        try:
            if len(connection.extract_statements(query)) != 1:
                raise UsageError(f"where {where!r} is more than one condition.", columns)
            found: Rows = connection.sql(query).fetchnumpy()["place"]
        except duckdb.Error as error:
            first = " ".join(str(error).split("\n\n")[0].split())
            raise UsageError(f"where {where!r} is no condition on the samples: {first}.", columns) from error
    keys = candidates["key"].take(pa.array(found))
    return np.asarray(found[pc.sort_indices(keys).to_numpy()])


def _view_rows(candidates: pa.Table, chosen: Rows, config: CurateConfig) -> pa.Table:
    """Sample references, sources, label columns, the cluster and the split, by key."""
    names = [*SAMPLE_REFERENCE.names, *SAMPLE_SOURCE.names]
    names += [name for name in candidates.column_names if name not in SAMPLES.names]
    split = _split(candidates, chosen, config)
    return candidates.select(names).take(pa.array(chosen)).append_column("split", split).combine_chunks()


def _split(candidates: pa.Table, chosen: Rows, config: CurateConfig) -> pa.Array:
    """``train`` or ``val`` of the chosen rows.

    All samples of the corpus count, chosen or not: a change of the condition moves no picture to the other side.
    """
    named = pc.binary_join_element_wise(candidates["collection"], candidates["relpath"], "/")
    encoded = named.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    groups = rank[encoded.indices.to_numpy()]
    if "cluster" in candidates.column_names:
        groups = linked(groups, candidates["cluster"])[groups]
    groups = groups[chosen]
    distinct = np.unique(groups)
    held = np.zeros(len(order), np.bool_)
    held[distinct] = held_back(encoded.dictionary.take(pa.array(order[distinct])), config.holdout, config.seed)
    return pc.if_else(pa.array(held[groups]), "val", "train")


def linked(sources: Rows, clusters: pa.ChunkedArray) -> Rows:
    """The smallest source that a chain of shared clusters ties each source to.

    Args:
        sources: of each sample, numbers from 0; a source may have several samples.
        clusters: of each sample; null: alone.
    """
    encoded = clusters.combine_chunks().dictionary_encode()
    known = encoded.is_valid().to_numpy(zero_copy_only=False)
    inside, cluster = sources[known], encoded.indices.drop_null().to_numpy()
    forest = Forest(int(sources.max(initial=-1)) + 1)
    first = np.full(len(encoded.dictionary), np.iinfo(np.int64).max)
    np.minimum.at(first, cluster, inside)
    forest.join(first[cluster], inside)
    return forest.roots()


def held_back(sources: pa.Array, holdout: float, seed: int) -> NDArray[np.bool_]:
    """Which source pictures are the split val: those whose hash is below ``holdout``.

    A picture's side does not depend on the others (copies aside), so a grown corpus keeps its split. With two
    sources or more each side has at least one.

    Args:
        sources: their names, each once, in order.
        holdout: share of them.
        seed: of the hash.
    """
    count = len(sources)
    held = np.zeros(count, np.bool_)
    if holdout == 0.0 or count < 2:
        return held
    drawn = np.fromiter((_drawn(seed, name.as_py()) for name in sources), np.float64, count)
    order = np.argsort(drawn, kind="stable")
    held[order[: min(max(int((drawn < holdout).sum()), 1), count - 1)]] = True
    return held


def _drawn(seed: int, source: str) -> float:
    """A number in [0, 1)."""
    return int(hashlib.sha256(f"{seed}/{source}".encode()).hexdigest()[:13], 16) / 16**13


def _write(corpus: Corpus, facts: Mapping[str, Any], data: bytes) -> tuple[int, bool]:
    """Version of the view, and whether it is new. Rows first, facts last; a race gives two versions."""
    storage, name = corpus.storage, str(facts["name"])
    taken = [entry.path for entry in storage.list(f"views/{name}")]
    for path in (path for path in reversed(taken) if path.endswith(".json")):
        stored = json.loads(storage.read(path))
        if {key: value for key, value in unstamped(stored).items() if key != "version"} == dict(facts):
            return int(stored["version"]), False
    first = max((int(path.rsplit("/v", 1)[1].split(".")[0]) for path in taken), default=0) + 1
    for version in range(first, first + _ATTEMPTS):
        path = view_path(name, version)
        document = stamped({**facts, "version": version})
        if storage.create(path, data) != data:
            continue
        if json.loads(storage.create(path.removesuffix(".parquet") + ".json", to_json(document))) == document:
            return version, True
    raise UsageError(f"{_ATTEMPTS} versions of view {name} were taken meanwhile.", "Run the command again.")
