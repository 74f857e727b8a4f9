"""Write ``.beton`` files through ffcv, with what ffcv itself does not promise.

ffcv hangs for ever when a sample does not fit a page, leaves a stub under the final name and checks
nothing (libffcv/ffcv issues 113, 135, 209). Here the page size follows from the largest sample, the
writer runs in a process of its own under a watchdog, the file is read back and compared before it takes
its name, and a sidecar written last holds its sha256 and the view it was made from.
"""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from iqpir.errors import PermanentError, UsageError, VerificationError

Picture = NDArray[np.uint8]
Mode = Literal["raw", "jpg"]
FIELDS = ("picture", "quality", "index")
"""Fields of every ``.beton``, in order: uint8 RGB, float64 in [0,1], row number in the view's split."""
_MIN_PAGE, _MAX_PAGE = 1 << 21, 1 << 31
_SAMPLES_PER_PAGE = 8
"""A page that holds n samples wastes at most one n-th of itself."""
_TERMINATE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class BetonFacts:
    """What the sidecar ``<name>.beton.json`` says; a ``.beton`` without it is unfinished."""

    sha256: str
    """Of the whole file."""
    size: int
    """Bytes of the file."""
    count: int
    """Samples."""
    view: str
    """``name@v0001``."""
    view_digest: str
    split: str
    image_size: int
    """Side of every picture, in pixels."""
    fit: str
    mode: Mode
    jpeg_quality: int
    pixels: str
    """Digest of the pixel policy the bytes were decoded under."""
    page_size: int

    def same_content(self, other: "BetonFacts") -> bool:
        """Whether both describe the same samples; ffcv's bytes differ from one writing to the next."""
        return dataclasses.replace(self, sha256=other.sha256, size=other.size) == other

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> "BetonFacts":
        """Inverse of ``json.dumps(dataclasses.asdict(facts))``.

        Raises:
            VerificationError: ``text`` is no sidecar of this version.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise VerificationError(f"{name} is no sidecar of a .beton.", "Export the view again.") from error


@dataclass(frozen=True, kw_only=True)
class BetonPlan:
    """Everything the writing process needs: JSON values, paths and numbers, no pixels."""

    corpus: str
    rows: str
    """Parquet file with shard, byte_offset, byte_size and quality of each sample, in order."""
    target: str
    image_size: int
    fit: str
    mode: Mode
    jpeg_quality: int
    page_size: int
    workers: int
    cache: str
    pixels: dict[str, Any]


def require_ffcv() -> None:
    """Raise UsageError where ffcv cannot be imported, saying what to install."""
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ffcv cannot be imported ({error}).",
            "Install the Debian packages pkg-config, libturbojpeg0-dev and libopencv-dev, "
            "then: pip install 'iqpir[export]'.",
        ) from error


def page_size_for(largest: int) -> int:
    """Page size in bytes for samples of at most ``largest`` bytes: a power of two that wastes little.

    Raises:
        UsageError: no page that ffcv allows holds the sample.
    """
    if largest > _MAX_PAGE:
        raise UsageError(f"A sample of {largest} bytes fits no page of ffcv (at most {_MAX_PAGE}).")
    wanted = min(max(largest * _SAMPLES_PER_PAGE, _MIN_PAGE), _MAX_PAGE)
    return 1 << (wanted - 1).bit_length()


def write_beton(plan: BetonPlan, stall_s: float, advance: Callable[[int], None] | None = None) -> None:
    """Write ``plan.target`` in a separate process; kill that process when it stops advancing.

    Args:
        plan: what to write.
        stall_s: seconds without a new sample after which the writer counts as hung.
        advance: called with the number of samples read so far.

    Raises:
        PermanentError: the writer failed or hung; nothing usable is left at the target.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    counts, counts_in = os.pipe()
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.exports.beton_writer", json.dumps(dataclasses.asdict(plan))],
            stdout=counts_in,
            stderr=messages,
            env=environment,
            start_new_session=True,
        )
        os.close(counts_in)
        hung = True
        try:
            hung = not _follow(counts, stall_s, advance)
        finally:
            os.close(counts)
            _stop_group(process, wait_s=0.0 if hung else _TERMINATE_S)
        messages.seek(0)
        lines = messages.read().decode(errors="replace").strip().splitlines()
    if hung:
        raise PermanentError(
            f"ffcv's writer read no new sample for {stall_s:g} s and was stopped.",
            "Is the storage of the corpus reachable? Else raise --stall_s.",
        )
    if process.returncode != 0:
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "killed")
        raise PermanentError(f"ffcv's writer failed: {reason.strip()}.", "Nothing was published.")


def _follow(counts: int, stall_s: float, advance: Callable[[int], None] | None) -> bool:
    """Pass the writer's counts on until it closes its end; False when they stop for ``stall_s`` seconds."""
    seen, last, pending = -1, time.monotonic(), b""
    while True:
        left = last + stall_s - time.monotonic()
        if left <= 0:
            return False
        if not select.select([counts], [], [], left)[0]:
            continue
        data = os.read(counts, 65536)
        if not data:
            return True
        *lines, pending = (pending + data).split(b"\n")
        if lines and int(lines[-1]) > seen:
            seen, last = int(lines[-1]), time.monotonic()
            if advance is not None:
                advance(seen)


def _stop_group(process: "subprocess.Popen[bytes]", wait_s: float) -> None:
    """Give the writer ``wait_s`` to end by itself, then end it and its workers.

    SIGTERM first: Python's resource tracker ignores it and then frees ffcv's shared memory.
    """
    for patience, action in ((wait_s, signal.SIGTERM), (_TERMINATE_S, signal.SIGKILL)):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, action)
    process.wait()
