"""One page about a corpus, its labels, a view and the models that were evaluated on it.

A single HTML file without scripts or requests: it can be mailed, stored beside the corpus and read offline.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from iqpir.errors import UsageError, VerificationError
from iqpir.pixels import PixelPolicy, decode, encode_jpeg, encode_png
from pipeline.corpus import Corpus
from pipeline.documents import in_threads
from pipeline.label import read_label_index, read_labels
from pipeline.reports.charts import histogram, quality_histogram, threshold_curve
from pipeline.reports.page import Evaluation, Page, Sheet, Thumb, render
from pipeline.storage import Storage
from pipeline.view import View, read_view

_THUMB = 192
"""Longest side of a stored thumbnail, in pixels; shown at about half of it."""
_MONTAGE = 1600
"""Widest montage that is embedded, in pixels."""
_SHOWN = 1000
"""CSS pixels that a montage may fill; smaller ones are enlarged by a whole number."""
_REASONS = 12
_EVALUATED = {"quality", "dial", "dial_spearman", "dial_range", "psnr", "ssim", "metrics"}
_EVALUATED |= {"samples", "checkpoint", "digest"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page is about, and where it goes."""

    corpus: str
    """Folder or URL of the corpus."""
    view: str
    """View: name or name@v0001."""
    output: str
    """The page: a path or URL that ends with .html."""
    labels: str = ""
    """Name of the labels that are shown; those the view was made from by default."""
    evaluations: list[str] = field(default_factory=list)
    """evaluation.json files (or their folders) that jobs/evaluate.py wrote."""
    thumbnails: int = 16
    """Pictures of each contact sheet."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""

    def __post_init__(self) -> None:
        if not self.output.endswith(".html"):
            raise UsageError(f"output {self.output} is no .html.", "Name a file, such as report.html.")
        if self.thumbnails < 0:
            raise UsageError(f"thumbnails {self.thumbnails} is negative.")


@dataclass(frozen=True)
class ReportResult:
    """Where the page is and what it counts."""

    output: str
    bytes: int
    inputs: int
    samples: int
    view: str
    chosen: int
    evaluations: int


@dataclass(frozen=True)
class Labelled:
    """Samples with a label, in columns of one length."""

    table: pa.Table
    """Sample references, relpath and label columns."""
    quality: NDArray[np.float64]
    spread: NDArray[np.float64]
    """Standard deviation of the calibrated metrics."""
    metrics: Mapping[str, NDArray[np.float64]]
    """Calibrated scores by metric, in [0,1]; nan where a metric failed."""
    chosen: NDArray[np.bool_]
    """In the view."""


def report(config: ReportConfig) -> ReportResult:
    """Write the page about a corpus, its labels, a view and evaluations.

    Raises:
        UsageError: no such corpus, view, labels or evaluation.
        VerificationError: an object is not what its record says.
    """
    corpus = Corpus(config.corpus)
    view = read_view(corpus, config.view)
    evaluations = [read_evaluation(path) for path in config.evaluations]
    rows = _input_rows(corpus)
    name = config.labels or str(view.facts["labels"])
    index = read_label_index(corpus, name)
    labelled = _join(corpus, read_labels(corpus, index), view)
    threshold = float(index["hq_threshold"])
    statuses = Counter(rows["status"].to_pylist())
    inputs = sum(unit.inputs for unit in corpus.manifest().units)
    page = Page(
        title=f"Quality report: {view.reference}",
        corpus=corpus.storage.url,
        figures=_figures(inputs, labelled, view),
        facts=_facts(view, name, index),
        statuses=dict(sorted(statuses.items(), key=lambda item: (item[0] != "success", -item[1], item[0]))),
        reasons=_reasons(rows),
        quality_chart=quality_histogram(labelled.quality, labelled.chosen, threshold),
        threshold_chart=threshold_curve(labelled.quality, threshold),
        metric_charts={
            metric: histogram(values[np.isfinite(values)], "calibrated score, 1 best")
            for metric, values in labelled.metrics.items()
        },
        agreement=agreement(labelled.metrics),
        sheets=_sheets(config, corpus, labelled, threshold),
        evaluations=evaluations,
    )
    data = render(page).encode()
    folder, _, file = config.output.rpartition("/")
    target = Storage.open(folder or ".")
    target.publish(file, data)
    return ReportResult(
        target.uri(file),
        len(data),
        inputs,
        len(labelled.quality),
        view.reference,
        int(labelled.chosen.sum()),
        len(evaluations),
    )


def _input_rows(corpus: Corpus) -> pa.Table:
    columns = ["relpath", "status", "error_code", "error_message"]
    return pa.concat_tables(in_threads(lambda unit: corpus.rows(unit, columns), corpus.manifest().units))


def _join(corpus: Corpus, labels: pa.Table, view: View) -> Labelled:
    """Labels beside where their samples are; ordered by key."""
    where = ["key", "relpath", "shard", "member", "byte_offset", "byte_size", "sha256", "width", "height"]
    table = corpus.samples(where).join(labels, "key", join_type="inner").sort_by("key")
    if table.num_rows == 0:
        raise VerificationError("Not one label belongs to a sample of the corpus.", "Label the corpus again.")
    metrics = {
        name.removeprefix("iqa_").removesuffix("_cal"): _floats(table[name])
        for name in table.column_names
        if name.startswith("iqa_") and name.endswith("_cal")
    }
    chosen = pc.is_in(table["key"], value_set=view.table["key"].combine_chunks())
    known = np.isfinite(_floats(table["quality"]))
    return Labelled(
        table.filter(pa.array(known)),
        _floats(table["quality"])[known],
        np.nan_to_num(_floats(table["quality_std"])[known]),
        {name: values[known] for name, values in metrics.items()},
        np.asarray(chosen)[known],
    )


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Nulls become nan."""
    return column.cast(pa.float64()).to_numpy()  # type: ignore[no-any-return]


def _figures(inputs: int, labelled: Labelled, view: View) -> dict[str, str]:
    splits = Counter(view.table["split"].to_pylist())
    return {
        "inputs": f"{inputs:,}",
        "labelled samples": f"{len(labelled.quality):,}",
        "in the view": f"{view.table.num_rows:,}",
        "of these held back": f"{splits['val']:,}",
        "mean quality, all": f"{labelled.quality.mean():.3f}",
        "mean quality, view": (f"{labelled.quality[labelled.chosen].mean():.3f}" if labelled.chosen.any() else "none"),
    }


def _facts(view: View, labels: str, index: Mapping[str, Any]) -> dict[str, str]:
    return {
        "view": view.reference,
        "digest": view.digest,
        "condition": str(view.facts.get("where") or "every sample"),
        "labels": f"{labels}, of {', '.join(index['metrics'])}",
        "calibration": str(index["calibration"]),
        "HQ+ threshold": f"{float(index['hq_threshold']):.4f}",
        "manifest": str(view.facts["manifest"]),
    }


def _reasons(rows: pa.Table) -> list[tuple[str, str]]:
    """Some inputs that gave no sample, the failed ones first."""
    lost = rows.filter(pc.not_equal(rows["status"], "success"))
    lost = lost.sort_by([("status", "ascending"), ("relpath", "ascending")])
    return [
        (row["relpath"], f"{row['status']}: {row['error_message'] or row['error_code'] or ''}".rstrip(": "))
        for row in lost.slice(0, _REASONS).to_pylist()
    ]


def agreement(metrics: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of each pair of metrics, over samples both scored; nan if undefined."""
    table: dict[str, dict[str, float]] = {}
    for first, left in metrics.items():
        table[first] = {}
        for second, right in metrics.items():
            both = np.isfinite(left) & np.isfinite(right)
            constant = both.sum() < 3 or np.ptp(left[both]) == 0 or np.ptp(right[both]) == 0
            table[first][second] = float("nan") if constant else float(spearmanr(left[both], right[both]).statistic)
    return table


def _sheets(config: ReportConfig, corpus: Corpus, labelled: Labelled, threshold: float) -> list[Sheet]:
    """Best, worst, around the threshold, and where the metrics disagree most; ties fall by key."""
    quality, spread = labelled.quality, labelled.spread
    wanted = {
        "Best": ("The highest quality.", -quality),
        "Worst": ("The lowest quality.", quality),
        "Around the HQ+ threshold": (
            f"Closest to {threshold:.3f}: would you put the line here?",
            np.abs(quality - threshold),
        ),
        "Largest disagreement": (
            "Where the metrics contradict each other; point at one for each score.",
            -spread,
        ),
    }
    return [
        Sheet(
            title=title,
            note=note,
            thumbs=_thumbs(config, corpus, labelled, np.argsort(order, kind="stable")[: config.thumbnails]),
        )
        for title, (note, order) in wanted.items()
    ]


def _thumbs(config: ReportConfig, corpus: Corpus, labelled: Labelled, numbers: Iterable[np.intp]) -> list[Thumb]:
    def thumb(number: np.intp) -> Thumb:
        row = labelled.table.slice(int(number), 1).to_pylist()[0]
        picture = Image.fromarray(decode(corpus.read_sample(row), config.pixels).array)
        scores = {name: values[number] for name, values in labelled.metrics.items()}
        detail = ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if np.isfinite(value))
        small = max(picture.size) <= _THUMB // 2
        picture.thumbnail((_THUMB, _THUMB))
        pixels = np.asarray(picture)
        return Thumb(
            data=encode_png(pixels) if small else encode_jpeg(pixels, 85),
            kind="png" if small else "jpeg",
            quality=float(labelled.quality[number]),
            name=PurePosixPath(row["relpath"]).name,
            detail=f"{row['relpath']}, {row['width']}x{row['height']}, {row['key']}: {detail}",
            pixelated=small,
        )

    return in_threads(thumb, numbers)


def read_evaluation(location: str) -> Evaluation:
    """An evaluation.json, or the one in a folder, with the montage beside it.

    Raises:
        UsageError: it is not there, or lacks what jobs/evaluate.py writes.
    """
    path = location if location.endswith(".json") else f"{location.rstrip('/')}/evaluation.json"
    folder, _, file = path.rpartition("/")
    storage = Storage.open(folder or ".")
    if not storage.exists(file):
        raise UsageError(f"{path} does not exist.", "jobs/evaluate.py writes it.")
    try:
        facts = json.loads(storage.read(file))
        missing = sorted(_EVALUATED - set(facts))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is no evaluation ({error}).", "jobs/evaluate.py writes them.") from error
    if missing:
        raise UsageError(f"{path} lacks {', '.join(missing)}.", "jobs/evaluate.py writes them.")
    montage = storage.read("montage.png") if storage.exists("montage.png") else None
    if montage is None:
        return Evaluation(source=storage.uri(file), facts=facts, montage=None)
    data, kind, width = _fitting(montage)
    return Evaluation(
        source=storage.uri(file),
        facts=facts,
        montage=data,
        montage_kind=kind,
        montage_scale=max(1, _SHOWN // width),
        montage_width=width,
    )


def _fitting(montage: bytes) -> tuple[bytes, str, int]:
    """The montage as it is, or as a JPEG of at most 1600 pixels width where it is wider; kind and width."""
    with Image.open(io.BytesIO(montage), formats=["PNG"]) as image:
        if image.width <= _MONTAGE:
            return montage, "png", image.width
        height = max(1, round(image.height * _MONTAGE / image.width))
        small = image.convert("RGB").resize((_MONTAGE, height), Image.Resampling.LANCZOS)
    return encode_jpeg(np.asarray(small), 90), "jpeg", _MONTAGE
