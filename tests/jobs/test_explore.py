"""``jobs/explore.py`` as one runs it: the page answers on this machine, chooses, shows, restores, and closes."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iqpir.pixels import decode, encode_png
from iqpir.restorer import Restorer
from tests.chain import make_data
from tests.conftest import draw_picture
from tests.pipeline.tiny_checkpoint import write_checkpoint
from tests.source_files import REPOSITORY

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed: pip install iqpir[app]")
pytestmark = pytest.mark.slow


class Page:
    """A running job, and a client of its page."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        (folder / "temporary").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "jobs/explore.py", "--corpus", str(folder / "corpus"), "--port", "0", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(folder / "temporary"), "HOME": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.up: dict[str, Any] = json.loads(line)
        self.client = gradio_client.Client(self.up["url"], verbose=False, download_files=str(folder / "downloads"))

    def look(self, where: str, low: float, high: float, order: str, score: str) -> tuple[Any, ...]:
        return tuple(self.client.predict(where, low, high, order, score, api_name="/look"))

    def restore(self, key: str, own: Any, preset: str, quality: float, fidelity: float) -> list[np.ndarray]:
        files = self.client.predict(key, own, preset, 0, quality, fidelity, api_name="/restore")
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("explore")
    (folder / "pictures").mkdir()
    for seed in range(6):
        Image.fromarray(draw_picture(seed, 32)).save(folder / "pictures" / f"{seed}.png")
    make_data(folder / "pictures", str(folder / "corpus"), "", "")
    write_checkpoint(folder / "checkpoint")
    running = Page(folder, "--model", str(folder / "checkpoint"))
    yield running
    running.process.kill()
    running.process.communicate()


def test_one_line_says_that_it_is_up_on_this_machine_alone(page: Page) -> None:
    url = page.up["url"]
    assert url.startswith("http://127.0.0.1:") and (page.up["samples"], page.up["labels"]) == (6, "default")
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    assert "iqpir explorer" in text and "googleapis" not in text
    port = int(url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass


def test_it_chooses_counts_and_shows(page: Page) -> None:
    counts, chart, pairs, gallery, command = page.look("width = 32", 0.5, 1.0, "best", "quality")
    shown = [float(entry["caption"]) for entry in gallery]
    assert shown == sorted(shown, reverse=True) and min(shown) >= 0.5
    assert f"{len(shown)} of 6 samples" in counts and chart.startswith("<svg") and "rank" in pairs
    assert "'(width = 32) and quality between 0.5 and 1'" in command
    assert Image.open(gallery[0]["image"]).size == (32, 32)
    assert page.look("true", 0.0, 1.0, "worst", "rank")[1].startswith("<svg")


def test_what_is_wrong_is_told_on_the_page(page: Page) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match=r"qualty.*Columns"):
        page.look("qualty > 1", 0.0, 1.0, "best", "quality")
    with pytest.raises(gradio_client.exceptions.AppError, match="There is no picture"):
        page.restore("", None, "as it is", 0.9, 0.0)
    whole = (page.folder / "pictures/0.png").read_bytes()
    (page.folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(gradio_client.exceptions.AppError, match="truncated"):
        page.restore("", gradio_client.handle_file(page.folder / "cut.png"), "as it is", 0.9, 0.0)


def test_it_restores_a_sample_and_a_picture_of_ones_own(page: Page) -> None:
    restorer = Restorer.load(page.folder / "checkpoint")
    file = page.folder / "pictures/3.png"
    own = decode(file.read_bytes()).array
    before, after = page.restore("", gradio_client.handle_file(file), "as it is", 0.3, 0.0)
    np.testing.assert_array_equal(before, own)
    np.testing.assert_array_equal(after, restorer.restore(own, 0.3))
    degraded, restored = page.restore("", gradio_client.handle_file(file), "tiny32", 0.3, 0.0)
    assert not np.array_equal(degraded, own)
    expected = decode(restorer.restore(encode_png(degraded), 0.3)).array
    np.testing.assert_array_equal(restored, expected)
    with pytest.raises(gradio_client.exceptions.AppError, match="no-key"):
        page.client.predict("no-key", api_name="/show")


def test_it_closes_when_asked_and_leaves_nothing(page: Page) -> None:
    page.process.send_signal(signal.SIGTERM)
    out, err = page.process.communicate(timeout=60)
    assert page.process.returncode == 0, err
    (last,) = out.splitlines()
    assert {**json.loads(last), "seconds": 0} == {**page.up, "seconds": 0}
    assert not list((page.folder / "temporary").glob("iqpir-explore-*"))
