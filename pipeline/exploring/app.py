"""The explorer's page: controls that call ``catalogue`` and ``trial``, and nothing else."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from iqpir.errors import IqpirError, UsageError
from iqpir.pixels import PictureError, decode
from iqpir.restorer import Restorer
from pipeline.exploring.catalogue import (
    ORDERS,
    QUALITY,
    Catalogue,
    Choice,
    Order,
    choose,
    column,
    condition,
    curate_command,
    facts_of,
    figures,
    picture_of,
    row_of,
    shown,
)
from pipeline.exploring.trial import AS_IT_IS, DEGRADATIONS, tried
from pipeline.report import agreement
from pipeline.reports.charts import histogram, quality_histogram

if TYPE_CHECKING:
    import gradio as gr

P = ParamSpec("P")
T = TypeVar("T")
Pixels = NDArray[np.uint8]

_THUMB, _LARGE = 256, 1024
"""Longest sides, in pixels, of a picture of the gallery and of the one that is looked at."""
_CHART = 330
"""Width of a histogram, in CSS pixels."""
FONT, MONOSPACED = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
"""Of the machine that looks: the page asks no other server for anything."""
CSS = ".small-too img { min-height: 256px; object-fit: contain; }"
"""Pictures of a few pixels are shown large enough to be looked at."""
_SHOWN: dict[str, Any] = {
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
    "elem_classes": "small-too",
}


def build(catalogue: Catalogue, restorer: Restorer | None, model: str, pictures: int) -> "gr.Blocks":
    """The page, not yet served.

    Args:
        catalogue: what is looked at.
        restorer: what restores; None: there is no model, and the page says how to name one.
        model: its name, for people.
        pictures: at most so many in the gallery.
    """
    import gradio as gr

    page = gr.Blocks(title="iqpir explorer", analytics_enabled=False)
    with page:
        gr.Markdown(f"## {catalogue.corpus.storage.url}\nlabels `{catalogue.labels}`, model `{model or 'none'}`")
        with gr.Tab("Corpus"):
            key = _corpus_tab(page, catalogue, pictures)
        with gr.Tab("Restore"):
            if restorer is None:
                gr.Markdown("Start the explorer with `--model models:/iqpir@champion`, a checkpoint or a run's folder.")
            else:
                _restore_tab(catalogue, restorer, key)
    return page


def _corpus_tab(page: "gr.Blocks", catalogue: Catalogue, pictures: int) -> "gr.Textbox":
    """Choose, count, look. Returns the box that holds the key of the sample that is looked at."""
    import gradio as gr

    with gr.Row():
        where = gr.Textbox("true", label="SQL condition", info="quality > 0.8 and width >= 512", scale=3)
        low = gr.Slider(0, 1, 0, step=0.01, label="quality from")
        high = gr.Slider(0, 1, 1, step=0.01, label="to")
        order = gr.Dropdown(list(ORDERS), value="best", label="order")
        score = gr.Dropdown(list(catalogue.scores), value=QUALITY, label="histogram of")
    button = gr.Button("Show", variant="primary")
    with gr.Row():
        with gr.Column(scale=2):
            counts = gr.HTML()
        with gr.Column(scale=3, min_width=_CHART + 80):
            chart = gr.HTML()
        with gr.Column(scale=2):
            pairs = gr.HTML()
    keys = gr.State([])
    gallery = gr.Gallery(label="pictures", columns=8, height=420, allow_preview=False, format="png", buttons=[])
    command = gr.Textbox(label="the view of this choice", buttons=["copy"], interactive=False)
    with gr.Row():
        picture = gr.Image(label="picture", height=420, **_SHOWN)
        with gr.Column():
            key = gr.Textbox(label="key")
            facts = gr.HTML()

    def look(where: str, low: float, high: float, order: Order, score: str) -> tuple[Any, ...]:
        text = condition(where, low, high)
        choice = choose(catalogue, text)
        rows = shown(choice, order, pictures)
        thumbs = [(picture_of(catalogue, row, _THUMB), f"{row[QUALITY]:.3f}") for row in rows]
        return (
            _table(figures(catalogue, choice).items()),
            chart_of(catalogue, choice, score),
            _agreement(catalogue, choice),
            thumbs,
            [row["key"] for row in rows],
            curate_command(catalogue, text),
        )

    def point(keys: list[str], event: gr.SelectData) -> str:
        return str(keys[event.index])

    def show(key: str) -> tuple[Pixels, str]:
        row = row_of(catalogue, key)
        return picture_of(catalogue, row, _LARGE), _table(facts_of(catalogue, row))

    inputs = [where, low, high, order, score]
    outputs = [counts, chart, pairs, gallery, keys, command]
    gr.on([button.click, where.submit], _told(look), inputs, outputs, api_name="look")
    page.load(_told(look), inputs, outputs, api_visibility="private")
    gallery.select(point, keys, key, api_visibility="private").then(
        _told(show), key, [picture, facts], api_visibility="private"
    )
    key.submit(_told(show), key, [picture, facts], api_name="show")
    return key


def _restore_tab(catalogue: Catalogue, restorer: Restorer, key: "gr.Textbox") -> None:
    """Degrade, restore, compare; the picture is the one that is looked at, or one of the user's."""
    import gradio as gr

    with gr.Row():
        # Its path, not its pixels: gradio would decode it by rules of its own.
        own = gr.Image(
            label="a picture of yours, in place of the one of the corpus",
            height=240,
            type="filepath",
            sources=["upload", "clipboard"],
        )
        with gr.Column():
            preset = gr.Dropdown(list(DEGRADATIONS), value=AS_IT_IS, label="degrade it first")
            seed = gr.Number(0, label="draw", precision=0, minimum=0)
        with gr.Column():
            quality = gr.Slider(0, 1, 0.95, step=0.01, label="quality")
            fidelity = gr.Slider(0, 1, 0, step=0.01, label="fidelity", info="above 0: needs a stage-3 model")
            button = gr.Button("Restore", variant="primary")
    with gr.Row():
        before, after = (gr.Image(label=label, **_SHOWN) for label in ("before", "restored"))

    def run(
        key: str, own: str | None, preset: str, seed: float, quality: float, fidelity: float
    ) -> tuple[Pixels, Pixels]:
        if own is None and not key:
            raise UsageError("There is no picture.", "Point at one in the corpus, or drop one here.")
        if own is None:
            picture = picture_of(catalogue, row_of(catalogue, key))
        else:
            picture = decode(Path(own).read_bytes(), catalogue.pixels).array
        return tried(restorer, picture, preset, int(seed), quality, fidelity)

    inputs = [key, own, preset, seed, quality, fidelity]
    gr.on([button.click, quality.release, fidelity.release], _told(run), inputs, [before, after], api_name="restore")


def chart_of(catalogue: Catalogue, choice: Choice, score: str) -> str:
    """Histogram of a score as SVG: of quality, the chosen samples apart from the others; else of the chosen ones.

    Raises:
        UsageError: the labels have no such score.
    """
    if score == QUALITY:
        return quality_histogram(column(catalogue.table, QUALITY), choice.chosen, catalogue.threshold, _CHART)
    if score not in catalogue.metrics:
        raise UsageError(f"The labels {catalogue.labels} have no score {score!r}.", f"Known: {catalogue.scores}.")
    values = column(choice.table, score)
    return histogram(values[np.isfinite(values)], f"{score}, calibrated, 1 best", _CHART)


def _agreement(catalogue: Catalogue, choice: Choice) -> str:
    """Spearman's correlation of each pair of metrics over the chosen samples."""
    table = agreement({metric: column(choice.table, metric) for metric in catalogue.metrics})
    head = "".join(f"<th>{escape(name)}</th>" for name in table)
    lines = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{value:.2f}</td>" for value in row.values()) + "</tr>"
        for name, row in table.items()
    )
    return f"<table><caption>rank correlation of the metrics</caption><tr><th></th>{head}</tr>{lines}</table>"


def _table(facts: Any) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table>{lines}</table>"


def _told(action: Callable[P, T]) -> Callable[P, T]:
    """``action``, whose errors for users are shown on the page."""

    import gradio as gr

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return action(*args, **kwargs)
        except (IqpirError, PictureError) as error:
            raise gr.Error(str(error), duration=None) from error

    return run
