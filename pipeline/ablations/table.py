"""Tables of an ablation: means over seeds with confidence intervals, and differences seed by seed."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import t

from pipeline.ablations.row import OUTSIDE, Row

LEVEL = 0.95
COLUMNS = {
    "quality": "quality",
    OUTSIDE: "outside",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "quality_spearman": "Spearman",
    "quality_range": "range",
    f"{OUTSIDE}_spearman": "outside Spearman",
    f"{OUTSIDE}_range": "outside range",
}
"""Figures in the table of variants, and what they are called."""
DIFFERENCES = ("quality", OUTSIDE, "psnr", "ssim", "hq_quality", "hq_psnr", "hq_ssim")
"""Figures whose differences answer questions, before those of each metric."""
DECIBEL = ("psnr", "hq_psnr")
Pairs = Mapping[str, tuple[str, str]]
"""Question -> variant, and variant that is subtracted from it."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its confidence interval (Student's t)."""

    mean: float
    half: float

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """``mean ± half``; with ``sign``, an interval that leaves 0 out is bold."""
        shown = (
            f"{self.mean:+.{digits}f} ± {self.half:.{digits}f}"
            if sign
            else f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"
        )
        return f"**{shown}**" if sign and abs(self.mean) > self.half else shown


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval of two values or more, taken as a sample of a normal distribution."""
    spread = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return Interval(float(np.mean(values)), float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * spread))


def of_variant(rows: Sequence[Row], variant: str, figure: str) -> dict[int, float]:
    """Seed -> figure."""
    return {row.seed: row.figures[figure] for row in rows if row.variant == variant and figure in row.figures}


def paired(rows: Sequence[Row], first: str, second: str, figure: str) -> list[float]:
    """``first`` minus ``second`` at each seed that both have."""
    left, right = of_variant(rows, first, figure), of_variant(rows, second, figure)
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def tables(rows: Sequence[Row], says: Mapping[str, str], comparisons: Pairs, outside: Sequence[str]) -> str:
    """The report as Markdown."""
    seeds = sorted({row.seed for row in rows})
    parts = [
        "# Ablation",
        "Written by `jobs/ablation.py`; each run is a line of `ablation.jsonl`.",
        _provenance(rows),
        f"Means over the seeds {', '.join(map(str, seeds))} with 95 % confidence intervals (Student's t, "
        f"n = {len(seeds)}: wide, and of training only, for the held-back pictures are the same). *quality*: "
        f"calibrated consensus of all metrics. *outside*: mean calibrated score of {_listed(outside)}, "
        "which no variant has in its loss. PSNR and SSIM are to the original. All at the highest dial setting, except "
        "Spearman and range, which are of the dial's curve.",
        "## Before restoration",
        _bases(rows, outside),
        "## Variants",
        _variants(rows, says),
        "![Measured against requested quality](ablation-dial.svg)",
        "A thin line is a seed, a thick one the mean over seeds.",
        "![Quality outside the loss against PSNR along the dial](ablation-frontier.svg)",
        "A line is the dial from 0.05 (small dots) to 0.95 (large ones); the cross is the degraded pictures.",
        "## Each metric at the highest setting",
        _metrics(rows, says),
        "## How far the dial moves each metric",
        "From the lowest to the highest setting; which of them are in the loss, the settings of the variant say.",
        _moved(rows, says),
        "## Above the training pictures?",
        "Whether the best dial setting exceeds the mean of the training's good pictures, the paper's central claim: "
        "the difference, bold where its interval leaves 0 out. The best of the settings is chosen on the pictures it "
        "is measured on, so both columns flatter; *quality* has metrics of the loss in it, *outside* has none.",
        _above(rows, says, outside),
        "## Questions",
        "First variant minus second, seed by seed; bold where the interval leaves 0 out. No correction for the number "
        "of comparisons. *HQ*: the held-back pictures above the HQ+ threshold.",
        _questions(rows, comparisons),
    ]
    return "\n\n".join(parts) + "\n"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def jsonl(rows: Sequence[Row]) -> str:
    """A line for each row."""
    return "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)


def _provenance(rows: Sequence[Row]) -> str:
    commits = sorted({row.commit for row in rows})
    machines = sorted({", ".join(f"{key} {value}" for key, value in sorted(row.machine.items())) for row in rows})
    minutes = sum(row.seconds for row in rows) / 60
    return f"Commit: {'; '.join(commits)}. Machine: {'; '.join(machines)}. {len(rows)} runs, {minutes:.0f} minutes."


def _bases(rows: Sequence[Row], outside: Sequence[str]) -> str:
    first = rows[0]
    lines = [["", "quality", "outside", "PSNR, dB", "SSIM"]]
    for base, text in (("lq", "degraded"), ("hq", "original")):
        values = first.bases[base]
        fidelity = [f"{values['psnr']:.2f}", f"{values['ssim']:.3f}"] if "psnr" in values else ["", ""]
        lines.append([text, f"{values['quality']:.3f}", f"{values[OUTSIDE]:.3f}", *fidelity])
    beyond = float(np.mean([first.training[name] for name in outside]))
    lines.append(["training pictures (mean)", f"{first.training['quality']:.3f}", f"{beyond:.3f}", "", ""])
    return _markdown(lines)


def _variants(rows: Sequence[Row], says: Mapping[str, str]) -> str:
    lines = [["variant", "", *COLUMNS.values()]]
    for variant, text in says.items():
        cells = [_cell(of_variant(rows, variant, figure).values(), figure) for figure in COLUMNS]
        lines.append([f"`{variant}`", text, *cells])
    return _markdown(lines)


def _metrics(rows: Sequence[Row], says: Mapping[str, str]) -> str:
    names = _metric_names(rows)
    lines = [["variant", *(f"`{name}`" for name in names)]]
    for base, text in (("lq", "degraded"), ("hq", "original")):
        lines.append([text, *(f"{rows[0].bases[base][name]:.3f}" for name in names)])
    for variant in says:
        lines.append([f"`{variant}`", *(_cell(of_variant(rows, variant, name).values(), name) for name in names)])
    return _markdown(lines)


def _moved(rows: Sequence[Row], says: Mapping[str, str]) -> str:
    names = _metric_names(rows)
    lines = [["variant", *(f"`{name}`" for name in names), "PSNR, dB", "SSIM"]]
    for variant in says:
        own = [row.curves for row in rows if row.variant == variant]
        cells = [_cell([curves[name][-1] - curves[name][0] for curves in own], name, True) for name in _also(names)]
        lines.append([f"`{variant}`", *cells])
    return _markdown(lines)


def _above(rows: Sequence[Row], says: Mapping[str, str], outside: Sequence[str]) -> str:
    lines = [["variant", "best quality", "minus training mean", "best outside", "minus training mean"]]
    for variant in says:
        cells = []
        for figure, metrics in (("quality", ["quality"]), (OUTSIDE, outside)):
            own = [row for row in rows if row.variant == variant]
            best = [row.figures[f"best_{figure}"] for row in own]
            means = [float(np.mean([row.training[name] for name in metrics])) for row in own]
            above = [measured - mean for measured, mean in zip(best, means, strict=True)]
            cells += [_cell(best, figure), _cell(above, figure, sign=True)]
        lines.append([f"`{variant}`", *cells])
    return _markdown(lines)


def _also(names: Sequence[str]) -> list[str]:
    """Metrics, and what tells fidelity."""
    return [*names, "psnr", "ssim"]


def _questions(rows: Sequence[Row], comparisons: Pairs) -> str:
    heads = {"hq_quality": "HQ: quality", "hq_psnr": "HQ: PSNR, dB", "hq_ssim": "HQ: SSIM", **COLUMNS}
    heads = {figure: heads[figure] for figure in DIFFERENCES} | {name: f"`{name}`" for name in _metric_names(rows)}
    lines = [["question", "first", "second", *heads.values()]]
    for question, (first, second) in comparisons.items():
        cells = [_cell(paired(rows, first, second, figure), figure, sign=True) for figure in heads]
        lines.append([question, f"`{first}`", f"`{second}`", *cells])
    return _markdown(lines)


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return [name for name in sorted(rows[0].bases["hq"]) if name not in ("quality", OUTSIDE)]


def _cell(values: Iterable[float], figure: str, sign: bool = False) -> str:
    numbers = list(values)
    return interval(numbers).text(2 if figure in DECIBEL else 3, sign) if len(numbers) > 1 else "-"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head; numbers to the right."""
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
