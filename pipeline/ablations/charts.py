"""Figures of an ablation as SVG files: the dial, and what quality costs in fidelity."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import vl_convert

from pipeline.ablations.row import OUTSIDE, Row

_INK, _GREY = "#333333", "#8a94a6"
_COLOURS = ("#4c7fd0", "#d9822b", "#3a9d6b", "#b0559c", "#7a6a55", "#c94f4f", "#5fa8b8", "#999933")


def figures(rows: Sequence[Row], variants: Sequence[str]) -> dict[str, str]:
    """Name of the figure -> SVG text."""
    shown = [row for row in rows if row.variant in variants]
    return {
        "dial": _svg(alt.hconcat(_dial(shown, variants, "quality"), _dial(shown, variants, OUTSIDE))),
        "frontier": _svg(_frontier(shown, variants)),
    }


def _means(rows: Sequence[Row], variant: str, curve: str) -> list[tuple[float, float]]:
    """(requested, mean over seeds) along the dial."""
    own = [row for row in rows if row.variant == variant]
    means = np.mean([row.curves[curve] for row in own], axis=0)
    return [(setting, float(mean)) for setting, mean in zip(own[0].dial, means, strict=True)]


def _chart(values: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=values))


def _dial(rows: Sequence[Row], variants: Sequence[str], curve: str) -> Any:
    """Measured against requested: thin lines are seeds, thick ones their means, dashed ones what it starts from."""
    seeds = [
        {"variant": row.variant, "seed": row.seed, "x": x, "y": y}
        for row in rows
        for x, y in zip(row.dial, row.curves[curve], strict=True)
    ]
    means = [{"variant": name, "x": x, "y": y} for name in variants for x, y in _means(rows, name, curve)]
    title = "measured quality" if curve == "quality" else "measured outside the loss"
    colour = alt.Color("variant:N", scale=_scale(variants), legend=alt.Legend(title=None))
    x = alt.X("x:Q", title="requested quality", scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("y:Q", title=title, scale=alt.Scale(zero=False))
    thin = _chart(seeds).mark_line(opacity=0.35, strokeWidth=1).encode(x=x, y=y, color=colour, detail="seed:N")
    thick = _chart(means).mark_line(point=True).encode(x=x, y=y, color=colour)
    rules = [
        {"y": rows[0].bases["lq"][curve], "name": "degraded"},
        {"y": rows[0].bases["hq"][curve], "name": "original"},
    ]
    if curve == "quality":
        rules.append({"y": rows[0].training["quality"], "name": "training mean"})
    data = _chart(rules)
    rule = data.mark_rule(color=_GREY, strokeDash=[4, 4]).encode(y="y:Q")
    name = data.mark_text(align="left", dx=3, dy=-6, color=_INK).encode(x=alt.value(0), y="y:Q", text="name:N")
    return alt.layer(rule, thin, thick, name).properties(width=300, height=260)


def _frontier(rows: Sequence[Row], variants: Sequence[str]) -> Any:
    """Quality outside the loss against PSNR, one line along the dial for each variant; the degraded as a cross."""
    points = []
    for variant in variants:
        quality, fidelity = _means(rows, variant, OUTSIDE), _means(rows, variant, "psnr")
        points += [
            {"variant": variant, "psnr": psnr, "quality": measured, "dial": setting}
            for (setting, measured), (_, psnr) in zip(quality, fidelity, strict=True)
        ]
    colour = alt.Color("variant:N", scale=_scale(variants), legend=alt.Legend(title=None))
    chart = _chart(points)
    x = alt.X("psnr:Q", title="PSNR to the original, dB", scale=alt.Scale(zero=False))
    y = alt.Y("quality:Q", title="measured outside the loss", scale=alt.Scale(zero=False))
    line = chart.mark_line().encode(x=x, y=y, color=colour, order="dial:Q")
    dots = chart.mark_circle(opacity=1).encode(x=x, y=y, color=colour, size=alt.Size("dial:Q", legend=None))
    base = rows[0].bases["lq"]
    cross = _chart([{"psnr": base["psnr"], "quality": base[OUTSIDE]}])
    degraded = cross.mark_point(shape="cross", size=90, color=_INK).encode(x=x, y=y)
    return alt.layer(line, dots, degraded).properties(width=420, height=300)


def _scale(variants: Sequence[str]) -> alt.Scale:
    colours = [_COLOURS[place % len(_COLOURS)] for place in range(len(variants))]
    return alt.Scale(domain=list(variants), range=colours)


def _svg(chart: Any) -> str:
    styled: Mapping[str, Any] = chart.configure(background="white", padding=8).configure_view(stroke=None).to_dict()
    return str(vl_convert.vegalite_to_svg(dict(_rounded(styled))))


def _rounded(values: Any) -> Any:
    """Floats with six digits: enough to draw, and the same text from any summation order."""
    if isinstance(values, dict):
        return {key: _rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(np.format_float_positional(values, 6, fractional=False)) if isinstance(values, float) else values
