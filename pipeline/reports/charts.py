"""Charts of the report as inline SVG: drawn once with Vega-Lite, no script in the page.

Text and axes take the page's own text colour, so one drawing serves light and dark.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from numpy.typing import NDArray

Values = NDArray[np.float64]
BLUE, ORANGE, GREY = "#4c7fd0", "#d9822b", "#8a94a6"
"""Readable on white and on near-black."""
BINS = 20
_INK = "#010203"
"""Stands for the page's text colour until the drawing is finished."""


def histogram(values: Values, title: str, width: int = 220) -> str:
    """Counts of values in [0,1], in twenty equal bins.

    Args:
        values: any number of values; those outside [0,1] count in the outer bins.
        title: under the horizontal axis.
        width: of the plot, in CSS pixels.
    """
    counts, edges = np.histogram(np.clip(values, 0.0, 1.0), bins=BINS, range=(0.0, 1.0))
    rows = [
        {"from": float(low), "to": float(high), "count": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return _svg(
        _chart(rows)
        .mark_bar(color=BLUE, binSpacing=1)
        .encode(
            x=alt.X("from:Q", bin="binned", title=title, scale=alt.Scale(domain=[0, 1]), axis=_axis(5)),
            x2="to:Q",
            y=alt.Y("count:Q", title="samples", axis=_axis(4)),
        )
        .properties(width=width, height=130)
    )


def quality_histogram(quality: Values, chosen: NDArray[np.bool_], threshold: float, width: int = 420) -> str:
    """As ``histogram``, the samples of the view apart from those left out."""
    rows = []
    for name, values in (("in the view", quality[chosen]), ("left out", quality[~chosen])):
        counts, edges = np.histogram(np.clip(values, 0.0, 1.0), bins=BINS, range=(0.0, 1.0))
        rows += [
            {"from": float(low), "to": float(high), "count": int(count), "set": name}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
    colours = alt.Scale(domain=["in the view", "left out"], range=[BLUE, GREY])
    bars = (
        _chart(rows)
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X("from:Q", bin="binned", title="quality", scale=alt.Scale(domain=[0, 1]), axis=_axis(10)),
            x2="to:Q",
            y=alt.Y("count:Q", title="samples", axis=_axis(5)),
            color=alt.Color("set:N", scale=colours, legend=alt.Legend(title=None, orient="top", labelColor=_INK)),
        )
        .properties(width=width, height=170)
    )
    return _svg(bars + _rule(threshold, ORANGE))


def threshold_curve(quality: Values, threshold: float, width: int = 420) -> str:
    """How many samples have a quality above t, for every t in [0,1]."""
    ordered = np.sort(quality)
    steps = np.linspace(0.0, 1.0, 101)
    kept = len(ordered) - np.searchsorted(ordered, steps, side="right")
    rows = [{"t": float(t), "kept": int(n)} for t, n in zip(steps, kept, strict=True)]
    line = (
        _chart(rows)
        .mark_area(color=BLUE, opacity=0.25, line={"color": BLUE, "strokeWidth": 2}, interpolate="step-after")
        .encode(
            x=alt.X("t:Q", title="quality above t", scale=alt.Scale(domain=[0, 1]), axis=_axis(6)),
            y=alt.Y("kept:Q", title="samples kept", axis=_axis(5)),
        )
        .properties(width=width, height=170)
    )
    return _svg(line + _rule(threshold, ORANGE))


def dial_curve(dial: Sequence[Sequence[float]], references: Mapping[str, float], width: int = 380) -> str:
    """Measured quality against the requested one.

    Args:
        dial: pairs (requested, measured), both in [0,1].
        references: horizontal lines by name, such as the quality of LQ and HQ.
        width: of the plot, in CSS pixels.
    """
    rows = [{"requested": float(x), "measured": float(y)} for x, y in dial]
    heights = [row["measured"] for row in rows] + [float(value) for value in references.values()]
    low, high = min(heights, default=0.0), max(heights, default=1.0)
    room = max(0.02, 0.12 * (high - low))
    scale = alt.Scale(domain=[max(0.0, _down(low - room)), min(1.0, _up(high + room))], nice=False, zero=False)
    encoding = {
        "x": alt.X("requested:Q", title="requested quality", scale=alt.Scale(domain=[0, 1]), axis=_axis(6)),
        "y": alt.Y("measured:Q", title="measured quality", scale=scale, axis=_axis(5)),
    }
    chart = _chart(rows)
    layers: list[alt.Chart] = [
        chart.mark_line(color=BLUE, strokeWidth=2).encode(**encoding),
        chart.mark_circle(color=BLUE, size=46, opacity=1).encode(**encoding),
    ]
    for name, value in references.items():
        data = _chart([{"y": float(value), "name": f"{name} {value:.2f}"}])
        layers.append(data.mark_rule(color=GREY, strokeDash=[4, 4]).encode(y="y:Q"))
        layers.append(
            data.mark_text(align="right", dy=-7, color=_INK, opacity=0.75).encode(
                x=alt.value(width - 4), y="y:Q", text="name:N"
            )
        )
    return _svg(alt.layer(*layers).properties(width=width, height=210))


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))


def _axis(ticks: int) -> alt.Axis:
    return alt.Axis(tickCount=ticks, grid=True)


def _rule(value: float, colour: str) -> alt.Chart:
    mark = _chart([{"at": value}]).mark_rule(color=colour, strokeWidth=2, strokeDash=[5, 3])
    ruled: alt.Chart = mark.encode(x=alt.X("at:Q"))
    return ruled


def _down(value: float) -> float:
    return math.floor(value * 20) / 20


def _up(value: float) -> float:
    return math.ceil(value * 20) / 20


def _svg(chart: Any) -> str:
    """SVG text of a chart, its ids made unique among all charts of a page."""
    font = "system-ui, sans-serif"
    styled = chart.configure(background="transparent", font=font, padding=4).configure_view(stroke=None)
    styled = styled.configure_axis(
        labelColor=_INK,
        titleColor=_INK,
        tickColor=_INK,
        domainColor=_INK,
        gridColor=_INK,
        domainOpacity=0.35,
        tickOpacity=0.35,
        gridOpacity=0.1,
        labelFontSize=11,
        titleFontSize=12,
        titleFontWeight="normal",
        titlePadding=8,
    )
    text = vl_convert.vegalite_to_svg(styled.to_dict())
    prefix = f"c{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text).replace("url(#", f"url(#{prefix}")
    return str(text.replace(_INK, "currentColor"))
