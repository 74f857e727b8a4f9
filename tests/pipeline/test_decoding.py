import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from iqpir.errors import UsageError
from iqpir.pixels import PictureError, PixelPolicy, decode, encode_jpeg, encode_png
from pipeline.shard import ShardConfig, shard
from pipeline.sharding.decoding import DecodeConfig, IsolatedDecoder, open_decoder
from pipeline.sources.inputs import InputError
from tests.conftest import draw_picture

BROKEN_CHILD = """
import json, os, signal, sys, time
from pipeline.sharding.decoder_child import serve
from pipeline.sharding.decoding import HereDecoder
from iqpir.pixels import PixelPolicy

def decoder(data, pixels):
    if data == b"hang":
        time.sleep(60)
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"leave":
        sys.exit(3)
    if data == b"eat":
        bytearray(1 << 40)
    return HereDecoder(PixelPolicy())(data, pixels)

options = json.loads(sys.argv[-1])
serve(decoder, options["memory"], options["timeout"])
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedDecoder]:
    """A decoder whose child hangs and crashes on demand."""
    script = tmp_path_factory.mktemp("child") / "child.py"
    script.write_text(BROKEN_CHILD)
    config = DecodeConfig(isolated=True, timeout=1.0)
    decoder = IsolatedDecoder(config, PixelPolicy(), [sys.executable, str(script)])
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def isolated() -> Iterator[Callable[..., Any]]:
    with open_decoder(DecodeConfig(isolated=True), PixelPolicy()) as decoder:
        yield decoder


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"hang", "decoder_timeout"),
        (b"crash", "decoder_crashed"),
        (b"leave", "decoder_crashed"),
        (b"eat", "decoder_crashed"),
    ],
)
def test_a_decoder_that_breaks_costs_one_picture(broken: IsolatedDecoder, data: bytes, code: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        broken(data, False)
    assert caught.value.code == code and time.monotonic() - began < 20
    png = encode_png(draw_picture(1, 32))
    assert broken(png, False)[0]["width"] == 32


@pytest.mark.parametrize("pixels", [False, True])
def test_an_isolated_decoder_says_what_one_in_this_process_says(isolated: Callable[..., Any], pixels: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode_jpeg(draw_picture(2, 48)[:32])
    files = [encode_png(draw_picture(1, 40)), turned, turned[:400], b"", b"no picture"]
    with open_decoder(DecodeConfig(), PixelPolicy()) as here:
        for data in files:
            answers = [answer(decoder, data, pixels) for decoder in (here, isolated)]
            assert answers[0][0] == answers[1][0]
            assert (answers[0][1] is None) == (not pixels or isinstance(answers[0][0], str))
            if answers[0][1] is not None:
                assert np.array_equal(answers[0][1], answers[1][1])


def answer(decoder: Callable[..., Any], data: bytes, pixels: bool) -> tuple[Any, Any]:
    try:
        return decoder(data, pixels)
    except PictureError as error:
        return f"{error.code} {error.message}", None


def test_threads_share_an_isolated_decoder(isolated: Callable[..., Any]) -> None:
    files = [encode_png(draw_picture(seed, 32 + seed)) for seed in range(12)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda data: isolated(data, True)[1], files))
    for data, array in zip(files, found, strict=True):
        assert np.array_equal(array, decode(data).array)


def test_a_picture_over_the_memory_limit_is_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (7000, 7000)).save(folder / "large.png", compress_level=1)
    Image.fromarray(draw_picture(1, 40)).save(folder / "small.png")
    decode_config = DecodeConfig(isolated=True, memory=96 * 2**20)
    result = shard(ShardConfig(input=str(folder), corpus=str(tmp_path / "c"), workers=0, decode=decode_config))
    assert result.statuses == {"success": 1, "failed_decoder_crashed": 1}


@pytest.mark.slow
def test_an_isolated_decoder_changes_no_byte_of_a_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.png").write_bytes(encode_png(draw_picture(seed, 40))[: 9999 if seed else 300])
    runs = [
        shard(
            ShardConfig(
                input=str(folder), corpus=str(tmp_path / name), workers=0, decode=DecodeConfig(isolated=isolated)
            )
        )
        for name, isolated in (("a", False), ("b", True))
    ]
    assert runs[0].manifest == runs[1].manifest and runs[0].statuses == {"success": 3, "failed_truncated": 1}


def test_children_end_with_their_decoder() -> None:
    before = _children()
    with open_decoder(DecodeConfig(isolated=True), PixelPolicy()) as decoder:
        decoder(encode_png(draw_picture(1, 32)), False)
        started = _children() - before
        assert started
    assert not _children() & started


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "decoder_child" in " ".join(child.cmdline())}


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"memory": 1}])
def test_limits_without_sense_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        DecodeConfig(**options)
