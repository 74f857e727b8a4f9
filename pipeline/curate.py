"""Choose samples by a SQL condition over their facts and labels: a view. Undoing the choice costs nothing.

The held-back split goes by the hash of the source picture, so crops of one picture never lie on both sides.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from iqpir.errors import UsageError
from pipeline.corpus import Corpus
from pipeline.label import read_label_index, read_labels
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
    new: bool
    """Whether a version was written; False: the newest equal one is named."""


def curate(config: CurateConfig) -> CurateResult:
    """Write a view of the samples that meet the condition; an equal one is not written again.

    Raises:
        UsageError: a condition that is no SQL or names unknown columns, or that nothing meets.
    """
    corpus = Corpus(config.corpus)
    index = read_label_index(corpus, config.labels)
    candidates = _candidates(corpus, read_labels(corpus, index))
    labelled = candidates.filter(pc.is_valid(candidates["quality"]))
    chosen = _select(labelled, config.where)
    if not chosen.num_rows:
        raise UsageError(
            f"No sample meets {config.where!r}.", f"{labelled.num_rows} have a quality; loosen the condition."
        )
    rows = _view_rows(chosen, config)
    val = pc.sum(pc.equal(rows["split"], "val")).as_py()
    data = to_parquet(rows)
    facts = {
        "name": config.name,
        "where": config.where,
        "holdout": config.holdout,
        "seed": config.seed,
        "labels": config.labels,
        "labels_digest": index["digest"],
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
    }
    version, new = _write(corpus, facts, data)
    return CurateResult(
        view=f"{config.name}@v{version:04d}",
        digest=str(facts["digest"]),
        samples=rows.num_rows,
        train=rows.num_rows - val,
        val=val,
        unlabelled=candidates.num_rows - labelled.num_rows,
        new=new,
    )


def _candidates(corpus: Corpus, labels: pa.Table) -> pa.Table:
    """Every live sample with its labels: the columns of ``SAMPLES`` and of the labels, by key."""
    samples = corpus.samples()
    joined = samples.join(labels, "key", join_type="left outer").sort_by("key")
    return joined.combine_chunks()


def _select(candidates: pa.Table, where: str) -> pa.Table:
    """Rows that meet the condition, by key; the condition sees this table and nothing else."""
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


def _view_rows(chosen: pa.Table, config: CurateConfig) -> pa.Table:
    """Sample references, label columns and the split."""
    position = chosen.column_names.index("metadata") + 1
    labels = chosen.column_names[position:]
    sources = [
        f"{collection}/{relpath}"
        for collection, relpath in zip(chosen["collection"].to_pylist(), chosen["relpath"].to_pylist(), strict=True)
    ]
    held_back = _held_back(set(sources), config.holdout, config.seed)
    split = pa.array(["val" if source in held_back else "train" for source in sources], pa.string())
    return chosen.select([*SAMPLE_REFERENCE.names, *labels]).append_column("split", split)


def _held_back(sources: set[str], holdout: float, seed: int) -> set[str]:
    """Source pictures of the split val: those whose hash is below ``holdout``.

    A picture's side does not depend on the others, so a grown corpus keeps its split. With two sources or
    more each side has at least one.
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
        if {key: value for key, value in stored.items() if key != "version"} == dict(facts):
            return int(stored["version"]), False
    first = max((int(path.rsplit("/v", 1)[1].split(".")[0]) for path in taken), default=0) + 1
    for version in range(first, first + _ATTEMPTS):
        path = view_path(name, version)
        document = {**facts, "version": version}
        if storage.create(path, data) != data:
            continue
        if json.loads(storage.create(path.removesuffix(".parquet") + ".json", to_json(document))) == document:
            return version, True
    raise UsageError(f"{_ATTEMPTS} versions of view {name} were taken meanwhile.", "Run the command again.")
