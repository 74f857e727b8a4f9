"""A process that decodes pictures from its standard input until that ends; ``pipeline.sharding.decoding`` starts it.

python -m pipeline.sharding.decoder_child '{"policy": {...}, "memory": 2147483648, "timeout": 60}'
"""

import json
import math
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iqpir.pixels import PictureError, PixelPolicy
from pipeline.sharding.decoding import ANSWER, READY, REQUEST, Decoded, HereDecoder

_GRACE = 5
"""Seconds after which a child that nobody killed in time ends by itself: its parent is gone."""


def serve(decoder: Callable[[bytes, bool], Decoded], memory: int, timeout: float) -> None:
    """Answer requests on standard input and output.

    Args:
        decoder: gives facts, and pixels if wanted.
        memory: bytes of address space beyond the present.
        timeout: seconds for one picture.
    """
    limit = _address_space() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    target.write(READY)
    target.flush()
    while len(header := source.read(REQUEST.size)) == REQUEST.size:
        pixels, length = REQUEST.unpack(header)
        data = source.read(length)
        signal.alarm(math.ceil(timeout) + _GRACE)
        answer, array = _answer(decoder, data, pixels)
        signal.alarm(0)
        text, raw = json.dumps(answer).encode(), b"" if array is None else array.tobytes()
        target.write(ANSWER.pack(len(text), len(raw)))
        target.write(text)
        target.write(raw)
        target.flush()


def _answer(
    decoder: Callable[[bytes, bool], Decoded], data: bytes, pixels: bool
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    try:
        return decoder(data, pixels)
    except PictureError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"memory": True}, None
        return {"code": error.code, "message": error.message}, None
    except MemoryError:
        return {"memory": True}, None


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def _main(options: dict[str, Any]) -> None:
    fields = options["policy"]
    policy = PixelPolicy(**{**fields, "formats": tuple(fields["formats"]), "background": tuple(fields["background"])})
    serve(HereDecoder(policy), options["memory"], options["timeout"])


if __name__ == "__main__":
    _main(json.loads(sys.argv[-1]))
