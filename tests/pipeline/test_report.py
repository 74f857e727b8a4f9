"""The report is one self-contained page, counts right, and shows text from data as text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iqpir.errors import UsageError
from pipeline.report import ReportConfig, agreement, report
from pipeline.reports.charts import threshold_curve

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Strict(HTMLParser):
    """Fails on a tag that is not closed; collects attributes and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def evaluation(folder: Path) -> str:
    folder.mkdir()
    facts = {
        "digest": "0123456789ab",
        "quality": {"lq": 0.31, "hq": 0.62, "restored": 0.71},
        "dial": [[0.05, 0.5], [0.35, 0.55], [0.65, 0.61], [0.95, 0.7]],
        "dial_spearman": 1.0,
        "dial_range": 0.2,
        "psnr": {"lq": 24.1, "restored": 22.3},
        "ssim": {"lq": 0.7, "restored": 0.66},
        "metrics": {"<i>rank</i>": {"lq": 0.3, "hq": 0.6, "restored": 0.8, "in_loss": True}},
        "samples": 64,
        "checkpoint": "runs/stage2",
        "stage1_digest": "ab",
    }
    (folder / "evaluation.json").write_text(json.dumps(facts))
    Image.new("RGB", (1700, 20), "red").save(folder / "montage.png")
    return str(folder)


@pytest.fixture(scope="module")
def page(labelled_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, Strict]:
    made = labelled_corpus(sides=(32,) * 8 + (300, 260))
    folder = tmp_path_factory.mktemp("report")
    result = report(
        ReportConfig(
            corpus=made.url,
            view="small",
            output=str(folder / "page.html"),
            evaluations=[evaluation(folder / "evaluated")],
            thumbnails=6,
        )
    )
    text = (folder / "page.html").read_text()
    parser = Strict()
    parser.feed(text)
    return result, text, parser


def test_it_is_one_whole_document_that_asks_for_nothing(page: tuple[Any, str, Strict]) -> None:
    result, text, parser = page
    assert parser.open == []
    assert result.bytes == len(text.encode())
    assert "<script" not in text
    for _, name, value in parser.attributes:
        assert name not in ("src", "href") or value.startswith("data:image/")
        assert not name.startswith("on")
    assert not re.search(r"url\((?!#)", text)


def test_text_from_data_is_shown_as_text(page: tuple[Any, str, Strict]) -> None:
    _, text, parser = page
    shown = "".join(parser.texts)
    for dangerous in ("<script>alert(1)</script>", "<i>rank</i>", "no <picture>.png"):
        assert dangerous in shown
        assert dangerous not in text


def test_counts_are_those_of_the_corpus(page: tuple[Any, str, Strict]) -> None:
    result, _, parser = page
    assert (result.inputs, result.samples, result.chosen, result.evaluations) == (12, 10, 10, 1)
    shown = " ".join(parser.texts)
    assert "failed_truncated" in shown
    assert "failed_not_an_image" in shown
    for value in ("0.310", "0.620", "0.710", "24.10", "22.30"):
        assert value in parser.texts


def test_sheets_and_montage_are_embedded(page: tuple[Any, str, Strict]) -> None:
    _, _, parser = page
    pictures = [value for tag, name, value in parser.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 4 * 6 + 1
    assert any(value.startswith("data:image/png") for value in pictures)
    assert any(value.startswith("data:image/jpeg") for value in pictures)


def test_ids_of_charts_do_not_clash(page: tuple[Any, str, Strict]) -> None:
    _, _, parser = page
    ids = [value for _, name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_agreement_is_rank_correlation_over_common_samples() -> None:
    rise = np.arange(10.0)
    holes = np.where(rise % 3 == 0, np.nan, rise**2)
    table = agreement({"a": rise, "b": -rise, "c": holes, "d": np.ones(10)})
    assert table["a"]["b"] == pytest.approx(-1)
    assert table["a"]["c"] == pytest.approx(1)
    assert np.isnan(table["a"]["d"])


def test_threshold_curve_falls_to_none() -> None:
    drawn = threshold_curve(np.array([0.2, 0.4, 0.9]), 0.5)
    assert drawn.startswith("<svg")
    assert "currentColor" in drawn


@pytest.mark.parametrize("text", ["[]", "{}", "no json"])
def test_what_is_no_evaluation_is_refused_before_anything_is_written(
    labelled_corpus: Any, tmp_path: Path, text: str
) -> None:
    made = labelled_corpus(sides=(32, 32, 32), held_back=1)
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(UsageError, match="evaluation"):
        report(
            ReportConfig(
                corpus=made.url,
                view="small",
                output=str(tmp_path / "page.html"),
                evaluations=[str(tmp_path)],
            )
        )
    assert not (tmp_path / "page.html").exists()


def test_missing_labels_and_wrong_names_say_what_to_do(labelled_corpus: Any, tmp_path: Path) -> None:
    made = labelled_corpus(sides=(32, 32, 32), held_back=1)
    with pytest.raises(UsageError, match=r"no labels 'other'"):
        report(ReportConfig(corpus=made.url, view="small", labels="other", output=str(tmp_path / "p.html")))
    with pytest.raises(UsageError, match=r"\.html"):
        ReportConfig(corpus="c", view="v", output="page.pdf")
