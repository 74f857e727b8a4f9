"""Metrics and pictures of one MLflow run that never stop or slow a training.

Every point is appended to a spool on disk; a thread delivers from there. While the server is away the spool
grows; when it is back, points that it already has are recognised by (key, step) and not sent again. So the
server's history becomes the spool's, without gaps and without repetitions, also over restarts of either side.
"""

import logging
import math
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from numpy.typing import NDArray

from iqpir.pixels import encode_png
from pipeline.tracking.courier import UNAVAILABLE, Courier, RunHandle

log = logging.getLogger(__name__)

NONFINITE = "tracking/nonfinite_points"
"""Metric that counts the NaN and infinite values that were dropped."""

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
_NOT_IN_IMAGE_NAMES = re.compile(r"[^\w\-. /]", re.ASCII)


class RunLog:
    """A ``MetricLog`` of one run. Only rank 0 logs; on other ranks it is never used and costs nothing.

    Args:
        handle: the run, from ``open_run``.
        spool: folder for the spool; the same one after a restart delivers what is left in it.
        period_seconds: pause between two deliveries.
        longest_wait_seconds: pause between two attempts while the server is away, at most.
    """

    def __init__(
        self,
        handle: RunHandle,
        spool: Path,
        *,
        period_seconds: float = 2.0,
        longest_wait_seconds: float = 30.0,
    ) -> None:
        self.handle = handle
        self._folder = spool / handle.run_id
        self._period, self._longest_wait = period_seconds, longest_wait_seconds
        self._started = threading.Lock()
        self._courier: Courier | None = None
        self._nonfinite = 0
        self._lost = 0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Keep ``values`` of ``step`` for delivery; returns at once, whatever server and disk do.

        NaN and infinite values are counted in the metric ``tracking/nonfinite_points`` instead.
        """
        numbers = {_NOT_IN_NAMES.sub("_", key): float(value) for key, value in values.items()}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        if len(finite) < len(numbers):
            self._nonfinite += len(numbers) - len(finite)
            finite[NONFINITE] = float(self._nonfinite)
        if finite:
            self._keep("points", {"time": _now_ms(), "step": int(step), "values": finite}, len(finite))

    def image(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """Keep a picture (uint8 RGB HWC) of ``step`` for delivery, as ``metrics`` does."""
        key = _NOT_IN_IMAGE_NAMES.sub("_", name)
        file = f"{key.replace('/', '~')}-{int(step):08d}.png"
        try:
            (self._folder / "images").mkdir(parents=True, exist_ok=True)
            (self._folder / "images" / file).write_bytes(encode_png(picture))
        except OSError as error:
            self._lose(1, error)
            return
        self._keep("images", {"time": _now_ms(), "step": int(step), "key": key, "file": file}, 1)

    def flush(self, deadline_seconds: float = 30.0) -> int:
        """Deliver now, for at most so long.

        Returns:
            points and pictures that are not delivered: still in the spool, refused, or lost to a full disk.
        """
        courier = self._running()
        return self._lost + (0 if courier is None else courier.flush(deadline_seconds))

    def close(self, status: str | None = None, deadline_seconds: float = 30.0) -> int:
        """``flush``, stop the thread, and set the run's ``status`` (see ``end_run``) if one is given.

        Returns:
            what was not delivered, as ``flush`` does.
        """
        courier = self._running()
        left = self._lost + (0 if courier is None else courier.close(deadline_seconds))
        if left:
            log.warning("%d points of run %s are not delivered; spool: %s", left, self.handle.run_id, self._folder)
        if status is not None:
            end_run(self.handle, status)
        with self._started:
            self._courier = None
        return left

    def _keep(self, kind: str, record: dict[str, Any], weight: int) -> None:
        courier = self._running()
        if courier is None:
            self._lose(weight, None)
            return
        spool = courier.points if kind == "points" else courier.images
        try:
            if not spool.append(record, weight):
                self._lose(weight, None)
        except OSError as error:
            self._lose(weight, error)

    def _running(self) -> "Courier | None":
        """The courier, started on first use; None while its folder cannot be written."""
        with self._started:
            if self._courier is None:
                try:
                    self._courier = Courier(self.handle, self._folder, self._period, self._longest_wait)
                except OSError as error:
                    log.warning("cannot spool metrics in %s: %s", self._folder, error)
            return self._courier

    def _lose(self, weight: int, error: OSError | None) -> None:
        if not self._lost:
            log.warning("metrics are lost: spool %s %s", self._folder, error or "is full")
        self._lost += weight


def end_run(handle: RunHandle, status: str) -> bool:
    """Set a run's status: ``FINISHED``, ``FAILED`` or ``KILLED``; False if the server is away (logged)."""
    try:
        MlflowClient(tracking_uri=handle.tracking_uri).set_terminated(handle.run_id, status)
    except UNAVAILABLE as error:
        log.warning("could not set run %s to %s: %s", handle.run_id, status, error)
        return False
    return True


def _now_ms() -> int:
    return int(time.time() * 1000)
