"""Choose samples by a SQL condition over their facts and labels: a view. Undoing the choice costs nothing.

The held-back split goes by the hash of the source picture, so crops of one picture never lie on both sides. With
``dedup`` it goes by groups of sources that share a cluster, so copies of one picture do not either.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iqpir.errors import UsageError
from pipeline.corpus import Corpus
from pipeline.dedup import read_dedup
from pipeline.documents import stamped, unstamped
from pipeline.duplicates.clusters import Forest
from pipeline.label import labels_facts, read_label_index, read_labels
from pipeline.layout import SAMPLE_REFERENCE, to_json, to_parquet, view_path
from pipeline.view import view_digest

log = logging.getLogger(__name__)

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")
_ATTEMPTS = 20


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


def curate(config: CurateConfig) -> CurateResult:
    """Write a view of the samples that meet the condition; an equal one is not written again.

    Raises:
        UsageError: a condition that is no SQL or names unknown columns, or that nothing meets.
    """
    corpus = Corpus(config.corpus)
    index = read_label_index(corpus, config.labels)
    found, clusters = read_dedup(corpus, config.dedup) if config.dedup else ({}, None)
    candidates = labelled_samples(corpus, read_labels(corpus, index), clusters)
    labelled = candidates.filter(pc.is_valid(candidates["quality"]))
    offered = labelled.filter(pc.is_null(labelled["duplicate_of"])) if _drops(config) else labelled
    chosen = meeting(offered, config.where)
    if not chosen.num_rows:
        raise UsageError(
            f"No sample meets {config.where!r}.", f"{offered.num_rows} have a quality; loosen the condition."
        )
    rows = _view_rows(chosen, _groups(candidates), config)
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
        unlabelled=candidates.num_rows - labelled.num_rows,
        duplicates=labelled.num_rows - offered.num_rows,
        new=new,
    )


def _drops(config: CurateConfig) -> bool:
    return bool(config.dedup) and config.drop_duplicates


def _dedup_facts(config: CurateConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a view says of its duplicates; nothing where none were named, as before there were any."""
    if not config.dedup:
        return {}
    return {"dedup": config.dedup, "dedup_digest": found["digest"], "drop_duplicates": config.drop_duplicates}


def labelled_samples(corpus: Corpus, labels: pa.Table, clusters: pa.Table | None) -> pa.Table:
    """Every live sample with its labels and cluster: columns of ``SAMPLES``, of the labels, of ``DEDUP``, by key."""
    joined = corpus.samples().join(labels, "key", join_type="left outer")
    if clusters is not None:
        joined = joined.join(clusters, "key", join_type="left outer")
    return joined.sort_by("key").combine_chunks()


def meeting(candidates: pa.Table, where: str) -> pa.Table:
    """Rows that meet the condition, by key; the condition sees this table and nothing else.

    Raises:
        UsageError: it is no condition; the message lists the columns.
    """
    columns = f"Columns: {', '.join(candidates.column_names)} (write one with a sign in double quotes)."
    with duckdb.connect(":memory:") as connection:
        connection.register("candidates", candidates)
        connection.execute("SET enable_external_access = false; SET lock_configuration = true")
        query = f"SELECT * FROM candidates WHERE (\n{where}\n) ORDER BY key"
        try:
            if len(connection.extract_statements(query)) != 1:
                raise UsageError(f"where {where!r} is more than one condition.", columns)
            found: pa.Table = connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            first = " ".join(str(error).split("\n\n")[0].split())
            raise UsageError(f"where {where!r} is no condition on the samples: {first}.", columns) from error
    return found.select(candidates.column_names).cast(candidates.schema)


def _view_rows(chosen: pa.Table, groups: Mapping[str, str], config: CurateConfig) -> pa.Table:
    """Sample references, label columns, the cluster and the split."""
    position = chosen.column_names.index("metadata") + 1
    labels = chosen.column_names[position:]
    sources = [groups[source] for source in _sources(chosen)]
    held_back = _held_back(set(sources), config.holdout, config.seed)
    split = pa.array(["val" if source in held_back else "train" for source in sources], pa.string())
    return chosen.select([*SAMPLE_REFERENCE.names, *labels]).append_column("split", split)


def _sources(samples: pa.Table) -> list[str]:
    """Source picture of each sample."""
    names = zip(samples["collection"].to_pylist(), samples["relpath"].to_pylist(), strict=True)
    return [f"{collection}/{relpath}" for collection, relpath in names]


def _groups(candidates: pa.Table) -> dict[str, str]:
    """Source picture -> first name of the sources that must lie on its side of the split.

    All samples of the corpus count, chosen or not: a change of the condition moves no picture to the other side.
    """
    sources = _sources(candidates)
    if "cluster" not in candidates.column_names:
        return {source: source for source in sources}
    return linked(sources, candidates["cluster"].to_pylist())


def linked(sources: Sequence[str], clusters: Sequence[str | None]) -> dict[str, str]:
    """Source -> the smallest source that a chain of shared clusters ties it to.

    Args:
        sources: of each sample; a source may have several samples.
        clusters: of each sample; None: alone.
    """
    names = sorted(set(sources))
    place = {name: row for row, name in enumerate(names)}
    first: dict[str, int] = {}
    pairs = [
        (first.setdefault(cluster, place[source]), place[source])
        for source, cluster in zip(sources, clusters, strict=True)
        if cluster is not None
    ]
    forest = Forest(len(names))
    if pairs:
        forest.join(*np.array(pairs, np.int64).T)
    return {name: names[root] for name, root in zip(names, forest.roots().tolist(), strict=True)}


def _held_back(sources: set[str], holdout: float, seed: int) -> set[str]:
    """Source pictures of the split val: those whose hash is below ``holdout``.

    A picture's side does not depend on the others (copies aside), so a grown corpus keeps its split. With two
    sources or more each side has at least one.
    """
    if holdout == 0.0 or len(sources) < 2:
        return set()
    drawn = {
        source: int(hashlib.sha256(f"{seed}/{source}".encode()).hexdigest()[:13], 16) / 16**13 for source in sources
    }
    ordered = sorted(sources, key=lambda source: (drawn[source], source))
    below = [source for source in ordered if drawn[source] < holdout]
    return set(below[: len(ordered) - 1] or ordered[:1])


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
