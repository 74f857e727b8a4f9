"""What a process without a terminal logs, kept for the driver, which has one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.command import log_to_stderr

_MOST = 100

Said = list[tuple[int, str]]
"""Level and text of each log entry, from the first on."""


@contextmanager
def heard(least: int = logging.NOTSET) -> Iterator[Said]:
    """What is logged in this process until the block ends, as a job in a terminal would show it; 100 entries at most.

    Args:
        least: lowest level that is kept.
    """
    said: Said = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            """Keep the record's text."""
            if len(said) < _MOST:
                said.append((record.levelno, f"{record.name}: {record.getMessage()}"))

    log_to_stderr()  # whose file keeps what is more than _MOST
    ear = Ear(least)
    logging.getLogger().addHandler(ear)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(ear)
