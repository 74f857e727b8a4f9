"""Serve a page on which one looks at a corpus by its quality and tries a model on its pictures.

It reads only. Whoever reaches its address sees every picture: it listens on this machine alone unless told otherwise.
"""

import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import FrameType

from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy
from iqpir.restorer import Restorer
from pipeline.corpus import Corpus
from pipeline.exploring.catalogue import Catalogue, open_catalogue
from pipeline.registry.opening import open_restorer

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """What is looked at, and where the page is."""

    corpus: str
    """Folder or URL of a labelled corpus."""
    labels: str = "default"
    """Labels that say what quality is."""
    dedup: str = ""
    """Duplicates (jobs/dedup.py --name) whose columns the condition sees; empty: none."""
    model: str = ""
    """What restores: ``models:/iqpir@champion``, a checkpoint directory or a run's folder; empty: nothing does."""
    tracking_uri: str = ""
    """MLflow server or database of ``models:/`` addresses; $MLFLOW_TRACKING_URI or the workspace's by default."""
    device: str = "cpu"
    """Where the model runs."""
    pictures: int = 48
    """Most pictures that are shown at once."""
    host: str = "127.0.0.1"
    """Address that is listened on; another one shows the corpus to whoever reaches it."""
    port: int = 7860
    """Port that is listened on; 0: a free one."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""

    def __post_init__(self) -> None:
        if self.pictures < 1 or not 0 <= self.port < 1 << 16:
            raise UsageError(f"pictures {self.pictures} is below 1, or port {self.port} is none.")


@dataclass(frozen=True)
class ExploreResult:
    """The page, from the moment it is up."""

    url: str
    corpus: str
    labels: str
    samples: int
    """With a quality."""
    unlabelled: int
    model: str
    seconds: float
    """Until the page was up, then until it was closed."""


def explore(config: ExploreConfig) -> ExploreResult:
    """Serve the page until SIGINT or SIGTERM. One JSON line on stdout says that it is up, another that it was closed.

    Raises:
        UsageError: gradio is not installed; no such corpus, labels or model; the port is taken.
    """
    started = time.monotonic()
    port = _listenable(config.host, config.port)
    catalogue = open_catalogue(Corpus(config.corpus), config.labels, config.dedup, config.pixels)
    if find_spec("gradio") is None:
        raise UsageError("The explorer needs gradio, which is not installed.", "pip install iqpir[app]", "docs/jobs.md")
    restorer = open_restorer(config.model, config.tracking_uri, config.device) if config.model else None
    if config.host not in LOOPBACK:
        log.warning("whoever reaches %s sees this corpus: there is no password", config.host)
    with _stop_signal() as stopped, _serving(config, port, catalogue, restorer) as url:
        result = ExploreResult(
            url=url,
            corpus=catalogue.corpus.storage.url,
            labels=config.labels,
            samples=catalogue.table.num_rows,
            unlabelled=catalogue.unlabelled,
            model=config.model,
            seconds=time.monotonic() - started,
        )
        sys.stdout.write(json.dumps(dataclasses.asdict(result), sort_keys=True) + "\n")
        sys.stdout.flush()
        log.info("%s is up; Ctrl-C closes it", url)
        stopped.wait()
    return dataclasses.replace(result, seconds=time.monotonic() - started)


@contextmanager
def _serving(config: ExploreConfig, port: int, catalogue: Catalogue, restorer: Restorer | None) -> Iterator[str]:
    """Address of the page while it is served; pictures that gradio keeps for it go when it ends."""
    with tempfile.TemporaryDirectory(prefix="iqpir-explore-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        import gradio as gr

        from pipeline.exploring.app import CSS, FONT, MONOSPACED, build

        page = build(catalogue, restorer, config.model, config.pictures)
        _, url, _ = page.launch(
            server_name=config.host,
            server_port=port,
            theme=gr.themes.Default(font=FONT, font_mono=MONOSPACED),
            css=CSS,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=["api"],
        )
        try:
            yield str(url)
        finally:
            page.close(verbose=False)


def _listenable(host: str, port: int) -> int:
    """``port``, or a free one for 0, on which this process may listen: known before a corpus is read.

    Raises:
        UsageError: it is taken, or the address is not one of this machine.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {host}:{port}: {error.strerror}.", "Take another --port; 0: any."
        ) from error


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set by SIGINT or SIGTERM: both are how one closes a page, and no failure."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
