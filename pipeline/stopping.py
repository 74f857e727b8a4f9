"""SIGTERM and Ctrl-C as a wish: what is at work ends well, and the same command goes on later."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from iqpir.errors import IncompleteError

log = logging.getLogger(__name__)


class StoppedError(IncompleteError):
    """The job was asked to stop, and has no result to show."""


@contextmanager
def stopping(told: str) -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; the second SIGINT interrupts as usual.

    Args:
        told: what the user is told then.

    In another thread than the main one no signal arrives, and the event stays unset.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.set()
        log.warning("stopping: %s", told)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
