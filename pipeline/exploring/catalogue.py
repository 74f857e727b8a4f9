"""The labelled samples of a corpus as one looks at them: chosen by a condition, ordered, counted, decoded."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy, decode
from pipeline.corpus import Corpus
from pipeline.curate import labelled_samples, meeting
from pipeline.dedup import read_dedup_index
from pipeline.label import read_label_index

Values = NDArray[np.float64]
Order = Literal["best", "worst", "even", "disagreement"]
ORDERS: tuple[Order, ...] = ("best", "worst", "even", "disagreement")
"""Highest or lowest quality first; evenly over the qualities there are; where metrics contradict each other most."""
QUALITY = "quality"


@dataclass(frozen=True)
class Catalogue:
    """Samples that have a quality, and what it means."""

    corpus: Corpus
    labels: str
    """Name of the labels."""
    dedup: str
    """Name of the duplicates, or ""."""
    metrics: tuple[str, ...]
    threshold: float
    """Above it a sample is HQ+."""
    table: pa.Table
    """Columns of ``SAMPLES`` and of the labels, by key."""
    unlabelled: int
    """Samples without a quality."""
    pixels: PixelPolicy

    @property
    def scores(self) -> tuple[str, ...]:
        """Columns that have a histogram, all in [0, 1]."""
        return (QUALITY, *self.metrics)


@dataclass(frozen=True)
class Choice:
    """Samples that meet a condition."""

    where: str
    chosen: NDArray[np.bool_]
    """Of each sample of the catalogue."""
    table: pa.Table
    """The chosen ones, by key."""


def open_catalogue(corpus: Corpus, labels: str, dedup: str, pixels: PixelPolicy) -> Catalogue:
    """Read the labels and the samples they are of.

    Raises:
        UsageError: no such corpus, labels or duplicates; or no sample has a quality.
    """
    index = read_label_index(corpus, labels)
    clusters = read_dedup_index(corpus, dedup) if dedup else {}
    samples = labelled_samples(corpus, index, clusters).sort_by("key").combine_chunks()
    known = samples.filter(pc.is_valid(samples[QUALITY]))
    if not known.num_rows:
        raise UsageError(f"Not one sample of the labels {labels} has a quality.", "See the statuses of the scores.")
    return Catalogue(
        corpus=corpus,
        labels=labels,
        dedup=dedup,
        metrics=tuple(index["metrics"]),
        threshold=float(index["hq_threshold"]),
        table=known,
        unlabelled=samples.num_rows - known.num_rows,
        pixels=pixels,
    )


def condition(where: str, low: float, high: float) -> str:
    """``where``, and a quality in [low, high]; the interval 0 to 1 adds nothing."""
    where = where.strip() or "true"
    if (low, high) == (0.0, 1.0):
        return where
    between = f"quality between {low:g} and {high:g}"
    return between if where == "true" else f"({where}) and {between}"


def choose(catalogue: Catalogue, where: str) -> Choice:
    """The samples that meet ``where``, maybe none.

    Raises:
        UsageError: it is no condition; the message lists the columns.
    """
    places = meeting(catalogue.table, where)
    chosen = np.zeros(catalogue.table.num_rows, np.bool_)
    chosen[places] = True
    return Choice(where, chosen, catalogue.table.take(pa.array(places)))


def shown(choice: Choice, order: Order, count: int) -> list[dict[str, Any]]:
    """Rows of at most ``count`` chosen samples, in an order whose ties fall by key."""
    quality = column(choice.table, QUALITY)
    if order == "even":
        ranked = np.argsort(quality, kind="stable")
        places = ranked[np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)]
    else:
        by = {"best": -quality, "worst": quality, "disagreement": -column(choice.table, "quality_std")}[order]
        places = np.argsort(by, kind="stable")[:count]
    rows: list[dict[str, Any]] = choice.table.take(pa.array(places, pa.int64())).to_pylist()
    return rows


def column(table: pa.Table, name: str) -> Values:
    """A score in [0, 1] of each row; nan where a metric failed. A metric's name means its calibrated score."""
    stored = name if name in table.column_names else f"iqa_{name}_cal"
    return table[stored].cast(pa.float64()).to_numpy()  # type: ignore[no-any-return]


def figures(catalogue: Catalogue, choice: Choice) -> dict[str, str]:
    """Counts and means of a choice, as texts."""
    count, total = choice.table.num_rows, catalogue.table.num_rows
    quality = column(choice.table, QUALITY)
    facts = {
        "chosen": f"{count:,} of {total:,} samples with a quality",
        "without a quality": f"{catalogue.unlabelled:,}",
    }
    if count:
        facts["quality"] = f"mean {quality.mean():.3f}, from {quality.min():.3f} to {quality.max():.3f}"
        facts["HQ+"] = f"{(quality > catalogue.threshold).mean():.0%} are above {catalogue.threshold:.3f}"
    return facts


def row_of(catalogue: Catalogue, key: str) -> dict[str, Any]:
    """The row of one sample.

    Raises:
        UsageError: there is none with that key.
    """
    rows = catalogue.table.filter(pc.equal(catalogue.table["key"], key)).to_pylist()
    if not rows:
        raise UsageError(f"No sample with a quality has the key {key!r}.", "Point at a picture.")
    return dict(rows[0])


def picture_of(catalogue: Catalogue, row: Mapping[str, Any], longest: int = 0) -> NDArray[np.uint8]:
    """Pixels of a sample, uint8 RGB HWC; no side is longer than ``longest``, if that is not 0.

    Raises:
        VerificationError: its bytes are not those that were committed.
    """
    pixels = decode(catalogue.corpus.read_sample(row), catalogue.pixels).array
    if not longest or max(pixels.shape[:2]) <= longest:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((longest, longest))
    return np.asarray(picture)


def facts_of(catalogue: Catalogue, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a sample: where it comes from, and each score, calibrated and raw."""

    def number(name: str) -> str:
        value = row[name]
        return "none" if value is None else f"{value:.4g}"

    facts = [(name, str(row[name])) for name in ("key", "relpath", "width", "height", "format")]
    facts += [(name, number(name)) for name in (QUALITY, "quality_std", "quality_bin")]
    for metric in catalogue.metrics:
        status = row[f"iqa_{metric}_status"]
        raw = f"{number(f'iqa_{metric}_cal')} (raw {number(f'iqa_{metric}')})"
        facts.append((metric, raw if row[f"iqa_{metric}"] is not None else str(status)))
    if catalogue.dedup:
        facts.append(("cluster", f"{row['cluster']}, of {row['cluster_size']}; duplicate of {row['duplicate_of']}"))
    return facts


def curate_command(catalogue: Catalogue, where: str) -> str:
    """What makes a view of a choice, to be copied into a shell."""
    words = ["python", "jobs/curate.py", "--corpus", catalogue.corpus.storage.url, "--labels", catalogue.labels]
    words += ["--dedup", catalogue.dedup] if catalogue.dedup else []
    return shlex.join([*words, "--where", where, "--name", "my-view"])
