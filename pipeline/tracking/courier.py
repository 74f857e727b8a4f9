"""The thread that carries a run's points from the spool to MLflow, each (key, step) once."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import requests
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.tracking.spool import Chunk, Spool

log = logging.getLogger(__name__)

UNAVAILABLE = (MlflowException, requests.RequestException, OSError, Boto3Error, BotoCoreError, ClientError)
"""What clients of the tracking server and its artifact store raise when these do not answer, or refuse."""

_BATCH = 1000
_REFUSED = "INVALID_PARAMETER_VALUE"


@dataclass(frozen=True)
class RunHandle:
    """Which run of which server; plain strings, so it travels to workers."""

    run_id: str
    experiment_id: str
    tracking_uri: str


class _Known:
    """Which (key, step) the server has. Histories are fetched only for keys that go back in steps."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        latest = client.get_run(run_id).data.to_proto().metrics
        self._last: dict[str, int] = {metric.key: int(metric.step) for metric in latest}
        self._history: dict[str, set[int]] = {}

    def has(self, key: str, step: int) -> bool:
        last = self._last.get(key)
        if last is None or step > last:
            return False
        if key not in self._history:
            history = self._client.get_metric_history(self._run_id, key)
            self._history[key] = {metric.step for metric in history}
        return step in self._history[key]

    def add(self, metrics: list[Metric]) -> None:
        for metric in metrics:
            self._last[metric.key] = max(metric.step, self._last.get(metric.key, metric.step))
            if metric.key in self._history:
                self._history[metric.key].add(metric.step)


class Courier:
    """Delivers what is in the spools of one run, until it is closed.

    Args:
        handle: the run.
        folder: of the spools ``points`` and ``images``; pictures lie in ``images/``.
        period: seconds between two deliveries.
        longest_wait: seconds between two attempts while the server is away, at most.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, handle: RunHandle, folder: Path, period: float, longest_wait: float) -> None:
        self.points, self.images = Spool(folder, "points"), Spool(folder, "images")
        self._run_id, self._pictures = handle.run_id, folder / "images"
        self._uri = handle.tracking_uri
        self._period, self._longest_wait = period, longest_wait
        self._client: MlflowClient | None = None
        self._known: _Known | None = None
        self._shown: set[str] | None = None
        self._refused = 0
        self._away = False
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="iqpir-run-log", daemon=True)
        self._thread.start()

    def flush(self, deadline_seconds: float) -> int:
        """Deliver now, for at most so long; what is left or was refused."""
        deadline = time.monotonic() + deadline_seconds
        while self._left() and self._thread.is_alive() and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.02)
        return self._left() + self._refused

    def close(self, deadline_seconds: float) -> int:
        """``flush``, then end the thread."""
        deadline = time.monotonic() + deadline_seconds
        left = self.flush(deadline_seconds)
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=max(0.1, deadline - time.monotonic()))
        if not self._thread.is_alive():
            self.points.close()
            self.images.close()
        return left

    def _left(self) -> int:
        return self.points.pending + self.images.pending

    def _run(self) -> None:
        wait = self._period
        while not self._stopping.is_set():
            self._wake.wait(wait)
            self._wake.clear()
            delivered = self._deliver()
            wait = self._period if delivered else min(max(2 * wait, 1.0), self._longest_wait)
            if not delivered:
                # flush() sets the event all the time: never hammer a server that is away.
                self._stopping.wait(0.5)

    def _deliver(self) -> bool:
        """Send everything that is open; False if the server did not take it."""
        if not self._left():
            return True
        try:
            self._client = self._client or MlflowClient(tracking_uri=self._uri)
            while chunk := self.points.read(_BATCH):
                self._send_points(self._client, chunk)
                self.points.advance(chunk)
            while chunk := self.images.read(1):
                self._send_image(self._client, chunk.records[0])
                self.images.advance(chunk)
        except UNAVAILABLE as error:
            # Whether the last request had an effect is unknown: ask again before the next one.
            self._known, self._shown = None, None
            if not self._away:
                log.warning("MLflow at %s does not answer; points wait in %s: %s", self._uri, self.points.path, error)
            self._away = True
            return False
        if self._away:
            log.info("MLflow at %s is back; every waiting point is delivered", self._uri)
        self._away = False
        return True

    def _send_points(self, client: MlflowClient, chunk: Chunk) -> None:
        self._known = known = self._known or _Known(client, self._run_id)
        fresh: dict[tuple[str, int], Metric] = {}
        for record in chunk.records:
            step = record["step"]
            for key, value in record["values"].items():
                if (key, step) not in fresh and not known.has(key, step):
                    fresh[key, step] = Metric(key, value, record["time"], step)
        metrics = list(fresh.values())
        for start in range(0, len(metrics), _BATCH):
            self._send_batch(client, known, metrics[start : start + _BATCH])

    def _send_batch(self, client: MlflowClient, known: _Known, metrics: list[Metric]) -> None:
        try:
            client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code != _REFUSED:
                raise
            if len(metrics) > 1:
                for metric in metrics:
                    self._send_batch(client, known, [metric])
                return
            self._refused += 1
            log.warning("MLflow refuses metric %r: %s", metrics[0].key, error.message)
            return
        known.add(metrics)

    def _send_image(self, client: MlflowClient, record: Mapping[str, Any]) -> None:
        if self._shown is None:
            paths = [PurePosixPath(item.path).name for item in client.list_artifacts(self._run_id, "images")]
            self._shown = {"+".join(name.split("+")[:3]) for name in paths}
        mark = f"{record['key'].replace('/', '~')}+step+{record['step']}"
        if mark in self._shown:
            return
        with Image.open(self._pictures / record["file"]) as picture:
            client.log_image(
                self._run_id,
                picture,
                key=record["key"],
                step=record["step"],
                timestamp=record["time"],
                synchronous=True,
            )
        self._shown.add(mark)
