"""The report's HTML: one file, no script, no request; light and dark. Every text from data is escaped."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pipeline.reports.charts import dial_curve
from pipeline.reports.style import STYLE


@dataclass(frozen=True, kw_only=True)
class Thumb:
    """One small picture of a contact sheet."""

    data: bytes
    """Encoded."""
    kind: str
    """``png`` or ``jpeg``."""
    quality: float
    """In [0,1]."""
    name: str
    """Shown below."""
    detail: str
    """Shown when pointed at."""
    pixelated: bool
    """Smaller than it is shown."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One contact sheet."""

    title: str
    note: str
    thumbs: Sequence[Thumb]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation.json, and the picture beside it."""

    source: str
    facts: Mapping[str, Any]
    montage: bytes | None
    montage_kind: str = "png"
    montage_scale: int = 1
    """How many times larger small pictures are shown."""
    montage_width: int = 0
    """In its own pixels."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything the page shows; texts are not yet escaped, ``charts`` are finished SVG."""

    title: str
    corpus: str
    figures: Mapping[str, str]
    """Headline numbers by name."""
    facts: Mapping[str, str]
    """Where the view comes from."""
    statuses: Mapping[str, int]
    """Inputs by status."""
    reasons: Sequence[tuple[str, str]]
    """(path, reason) of some inputs without a sample."""
    quality_chart: str
    threshold_chart: str
    metric_charts: Mapping[str, str]
    agreement: Mapping[str, Mapping[str, float]]
    """Rank correlation by pair of metrics."""
    sheets: Sequence[Sheet]
    evaluations: Sequence[Evaluation] = field(default_factory=tuple)


def render(page: Page) -> str:
    """The whole document."""
    sections = [
        _head(page),
        _inputs(page),
        _quality(page),
        _metrics(page),
        "".join(_sheet(sheet) for sheet in page.sheets),
        _evaluations(page.evaluations),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(page: Page) -> str:
    figures = "".join(
        f'<div class="card"><b>{escape(value)}</b><span class="soft">{escape(name)}</span></div>'
        for name, value in page.figures.items()
    )
    return (
        f"<header><h1>{escape(page.title)}</h1>"
        f'<p class="mono soft">{escape(page.corpus)}</p></header>'
        f'<div class="figures">{figures}</div>'
        f'<section class="card"><h3>Where it comes from</h3>{_definitions(page.facts)}</section>'
    )


def _definitions(facts: Mapping[str, str]) -> str:
    rows = "".join(f'<dt>{escape(name)}</dt><dd class="mono">{escape(value)}</dd>' for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def _inputs(page: Page) -> str:
    reasons = ""
    if page.reasons:
        rows = "".join(
            f'<tr><td class="mono">{escape(path)}</td><td style="text-align:left">{escape(reason)}</td></tr>'
            for path, reason in page.reasons
        )
        reasons = (
            '<div class="card scroll"><h3>Inputs without a sample</h3>'
            f"<table><tr><th>input</th><th style='text-align:left'>reason</th></tr>{rows}</table></div>"
        )
    return (
        '<section><h2>What became of the inputs</h2><div class="row">'
        f'<figure class="card"><h3>By status</h3>{_bars(page.statuses)}'
        f"<figcaption>One row a sample, and one for each input that gave none.</figcaption></figure>{reasons}"
        "</div></section>"
    )


def _bars(counts: Mapping[str, int]) -> str:
    """One horizontal bar a name, as long as its share of the largest."""
    most = max(counts.values(), default=1)
    rows = "".join(
        f'<span>{escape(name)}</span><i class="{"good" if name == "success" else ""}" '
        f'style="width: {100 * count / most:.2f}%"></i><span>{count:,}</span>'
        for name, count in counts.items()
    )
    return f'<div class="bars">{rows}</div>'


def _quality(page: Page) -> str:
    return (
        '<section><h2>Quality</h2><div class="row">'
        f'<figure class="card wide"><h3>Distribution</h3>{page.quality_chart}'
        "<figcaption>Calibrated consensus of the metrics. The dashed line is the HQ+ threshold.</figcaption>"
        f'</figure><figure class="card wide"><h3>What a threshold keeps</h3>{page.threshold_chart}'
        "<figcaption>Samples with a quality above t, before any other condition.</figcaption></figure>"
        "</div></section>"
    )


def _metrics(page: Page) -> str:
    charts = "".join(
        f'<figure class="card"><h3>{escape(name)}</h3>{chart}</figure>' for name, chart in page.metric_charts.items()
    )
    return f'<section><h2>Metrics</h2><div class="row">{charts}{_agreement(page.agreement)}</div></section>'


def _agreement(agreement: Mapping[str, Mapping[str, float]]) -> str:
    """Heat table of rank correlations; blue agrees, orange contradicts."""
    names = list(agreement)
    if len(names) < 2:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{escape(a)}</td>" + "".join(_heat(agreement[a][b]) for b in names) + "</tr>" for a in names
    )
    return (
        '<figure class="card scroll"><h3>Agreement</h3>'
        f"<table><tr><th></th>{head}</tr>{rows}</table>"
        "<figcaption>Spearman rank correlation of the calibrated scores; 1 is full agreement."
        "</figcaption></figure>"
    )


def _heat(value: float) -> str:
    if value != value:  # no correlation is defined for a metric that is constant
        return '<td class="cell">n/a</td>'
    colour = "76, 127, 208" if value >= 0 else "217, 130, 43"
    return f'<td class="cell" style="background: rgba({colour}, {abs(value) * 0.6:.2f})">{value:.2f}</td>'


def _sheet(sheet: Sheet) -> str:
    if not sheet.thumbs:
        return ""
    thumbs = "".join(
        f'<figure title="{escape(thumb.name)}&#10;{escape(thumb.detail)}">'
        f'<img {"class=pixelated " if thumb.pixelated else ""}alt="{escape(thumb.name)}" '
        f'src="{_uri(thumb.data, thumb.kind)}">'
        f"<figcaption><b>{thumb.quality:.2f}</b> {escape(thumb.name)}</figcaption></figure>"
        for thumb in sheet.thumbs
    )
    return (
        f'<section><h2>{escape(sheet.title)}</h2><p class="soft">{escape(sheet.note)}</p>'
        f'<div class="card"><div class="sheet" style="margin-top:0">{thumbs}</div></div></section>'
    )


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _evaluations(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    return "<section><h2>Evaluations</h2>" + "".join(map(_evaluation, evaluations)) + "</section>"


def _evaluation(evaluation: Evaluation) -> str:
    facts = evaluation.facts
    lineage = {
        "checkpoint": str(facts["checkpoint"]),
        "evaluation": str(facts["digest"]),
        "held-back samples": str(facts["samples"]),
        "dial": f"Spearman {facts['dial_spearman']:.3f}, range {facts['dial_range']:.3f}",
        "read from": evaluation.source,
    }
    references = {name.upper(): facts["quality"][name] for name in ("lq", "hq")}
    montage = ""
    if evaluation.montage is not None:
        montage = (
            '<figure class="card"><h3>Pictures</h3>'
            f'<img class="montage{" pixelated" if evaluation.montage_scale > 1 else ""}" '
            f'style="width: {evaluation.montage_width * evaluation.montage_scale}px" '
            f'alt="LQ, restored and HQ pictures" '
            f'src="{_uri(evaluation.montage, evaluation.montage_kind)}"></figure>'
        )
    return (
        f'<div class="card">{_definitions(lineage)}</div>'
        '<div class="row last"><div class="card scroll"><h3>Before and after</h3>'
        f"{_before_after(facts)}"
        '<p class="soft">Means over the held-back samples. A metric marked with * was part of the loss, '
        "so it is no independent judge.</p></div>"
        f'<figure class="card wide"><h3>The dial</h3>{dial_curve(facts["dial"], references)}</figure></div>'
        f"{montage}"
    )


def _before_after(facts: Mapping[str, Any]) -> str:
    """Quality, each metric, PSNR and SSIM of LQ, restored and HQ."""
    rows = [_figures("quality", facts["quality"], 3)]
    if "outside" in facts:
        rows.append(_figures("outside the loss", facts["outside"], 3))
    for name, values in facts["metrics"].items():
        rows.append(_figures(f"{name} *" if values.get("in_loss") else name, values, 3))
    rows += [_figures("PSNR, dB", facts["psnr"], 2), _figures("SSIM", facts["ssim"], 3)]
    return "<table><tr><th></th><th>LQ</th><th>restored</th><th>HQ</th></tr>" + "".join(rows) + "</table>"


def _figures(name: str, values: Mapping[str, Any], digits: int) -> str:
    cells = "".join(
        f"<td>{values[column]:.{digits}f}</td>" if column in values else "<td></td>"
        for column in ("lq", "restored", "hq")
    )
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"
