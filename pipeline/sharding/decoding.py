"""Decode the pictures of a unit: in this process, or in children that may hang or crash.

Pillow's decoders are C code that reads files of strangers. A child has a time and a memory limit; one that breaks
either costs its picture a row, and is replaced.
"""

import contextlib
import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from iqpir.errors import UsageError
from iqpir.pixels import PictureError, PixelPolicy, decode, read_facts
from pipeline.sources.inputs import InputError

Decoded = tuple[dict[str, Any], NDArray[np.uint8] | None]
"""Facts of a picture (``iqpir.pixels.Picture.facts``), and ``uint8 [H, W, 3]`` where pixels were asked for."""

REQUEST = struct.Struct(">?Q")
"""Whether pixels are wanted, length of the encoded picture that follows."""
ANSWER = struct.Struct(">QQ")
"""Lengths of the JSON and of the pixels that follow."""
READY = b"ready\n"
START_SECONDS = 60.0
_CHILD = (sys.executable, "-m", "pipeline.sharding.decoder_child")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Where pictures are decoded."""

    isolated: bool = False
    """Whether decoders run in child processes with limits, for files that nobody vouches for."""
    timeout: float = 60.0
    """Seconds that an isolated decoder has for one picture."""
    memory: int = 2 * 2**30
    """Bytes of address space that an isolated decoder may take beyond what it starts with."""

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.memory < 2**20:
            raise UsageError(
                f"decode timeout {self.timeout} or memory {self.memory} is too small.",
                "Give seconds above 0, and 1048576 bytes or more.",
            )
        if self.isolated and not Path("/proc/self/statm").exists():
            raise UsageError("Isolated decoders need Linux.", "Use --no-decode.isolated.")


class Decoder(Protocol):
    """Decodes whole first frames; fit for several threads."""

    def __call__(self, data: bytes, pixels: bool) -> Decoded:
        """Facts, and pixels if wanted. Raises ``PictureError`` or ``InputError``."""


@contextlib.contextmanager
def open_decoder(config: DecodeConfig, policy: PixelPolicy) -> Iterator[Decoder]:
    """A decoder as configured; its children end with the block."""
    if not config.isolated:
        yield HereDecoder(policy)
        return
    decoder = IsolatedDecoder(config, policy)
    try:
        yield decoder
    finally:
        decoder.close()


@dataclass(frozen=True)
class HereDecoder:
    """Decodes in this process."""

    policy: PixelPolicy

    def __call__(self, data: bytes, pixels: bool) -> Decoded:
        """As ``Decoder``."""
        if not pixels:
            return read_facts(data, self.policy), None
        picture = decode(data, self.policy)
        return picture.facts(), picture.array


class IsolatedDecoder:
    """Decodes in child processes, one per thread that asks.

    Args:
        config: limits.
        policy: what may be decoded.
        command: starts a child that speaks as ``pipeline.sharding.decoder_child`` does.
    """

    def __init__(self, config: DecodeConfig, policy: PixelPolicy, command: Sequence[str] = _CHILD) -> None:
        self._config = config
        options = {"policy": asdict(policy), "memory": config.memory, "timeout": config.timeout}
        self._command = [*command, json.dumps(options)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()

    def __call__(self, data: bytes, pixels: bool) -> Decoded:
        """As ``Decoder``; ``decoder_timeout`` and ``decoder_crashed`` are codes of the ``InputError``."""
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            child = _Child(self._command)
        header, raw = child.ask(data, pixels, self._config.timeout)
        self._idle.put(child)
        answer = json.loads(header)
        if "memory" in answer:
            raise InputError("decoder_crashed", f"The decoder needed more than {self._config.memory} bytes.")
        if "code" in answer:
            raise PictureError(answer["code"], answer["message"])
        if not pixels:
            return answer, None
        return answer, np.frombuffer(raw, np.uint8).reshape(answer["height"], answer["width"], 3)

    def close(self) -> None:
        """End the children."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().end()


class _Child:
    """One decoding process."""

    def __init__(self, command: Sequence[str]) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # each takes address space
        environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        with self._limit(START_SECONDS):
            ready = self._output.read(len(READY))
        if ready != READY:
            self._kill()
            raise OSError(f"A decoder process does not start: {' '.join(command[:3])}")

    def ask(self, data: bytes, pixels: bool, seconds: float) -> tuple[bytes, bytes]:
        """The answer to one request; afterwards the child is ready for the next, or dead."""
        answer, code = None, 0
        with self._limit(seconds) as late:
            try:
                self._input.write(REQUEST.pack(pixels, len(data)) + data)
                self._input.flush()
                lengths = ANSWER.unpack(self._read(ANSWER.size))
                answer = self._read(lengths[0]), self._read(lengths[1])
            except (BrokenPipeError, EOFError):
                code = self._kill()
        if answer is not None and not late.is_set():
            return answer
        if late.is_set():
            self._kill()
            raise InputError("decoder_timeout", f"The picture was not decoded within {seconds:g} s.")
        raise InputError("decoder_crashed", f"The decoder ended with code {code} at this picture.")

    def end(self) -> None:
        """Close the child's input, which ends it."""
        self._input.close()
        self._process.wait()
        self._output.close()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _read(self, length: int) -> bytes:
        data = self._output.read(length)
        if len(data) < length:
            raise EOFError
        return data

    def _kill(self) -> int:
        self._process.kill()
        code = self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._output.close()
        return code

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[threading.Event]:
        """Kill the child after ``seconds``; the event says whether that happened."""
        late = threading.Event()

        def expire() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, expire)
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()
