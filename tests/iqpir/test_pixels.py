"""What ``iqpir.pixels`` promises, on files made here."""

import io
import itertools
import pickle
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from iqpir.errors import UsageError
from iqpir.pixels import (
    CODES,
    FORMATS,
    Picture,
    PictureError,
    PixelPolicy,
    decode,
    encode_jpeg,
    encode_png,
    read_facts,
)

HEIGHT, WIDTH = 24, 40


def ramp() -> NDArray[np.uint8]:
    """An asymmetric smooth picture, uint8 [24, 40, 3]."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 6, y * 10, (x + y) * 3], axis=-1).astype(np.uint8)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def code_of(data: bytes, policy: PixelPolicy | None = None) -> str:
    with pytest.raises(PictureError) as caught:
        decode(data, policy)
    assert caught.value.code in CODES
    assert caught.value.message
    return caught.value.code


def png_header(width: int, height: int) -> bytes:
    """A PNG that is all header: it announces a size and holds one row of nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"")), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_png_round_trip_is_exact_and_deterministic() -> None:
    data = encode_png(ramp())
    assert data == encode_png(ramp())
    picture = decode(data)
    assert np.array_equal(picture.array, ramp())
    assert picture.array.flags.writeable
    assert picture.array.flags.c_contiguous
    assert picture.facts() == {
        "format": "PNG",
        "width": WIDTH,
        "height": HEIGHT,
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "bit_depth": 8,
        "channels": 3,
        "exif_orientation": 1,
        "icc_profile": False,
        "icc_broken": False,
        "had_alpha": False,
        "animated": False,
    }


def test_jpeg_quality_is_obeyed() -> None:
    rough, fine = decode(encode_jpeg(ramp(), 30)), decode(encode_jpeg(ramp(), 98))
    error = [np.abs(p.array.astype(int) - ramp()).mean() for p in (rough, fine)]
    assert error[1] < error[0]
    assert error[1] < 3


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_opens_by_content(file_format: str) -> None:
    picture = decode(saved(Image.fromarray(ramp()), file_format))
    assert picture.format == file_format
    assert picture.array.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(picture.array.astype(int) - ramp()).mean() < 16


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(file_format: str, orientation: int) -> None:
    # The stored picture is the upright one moved back by the inverse of what the tag asks for.
    inverse = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = np.ascontiguousarray(inverse(ramp()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    if file_format == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    picture = decode(saved(Image.fromarray(stored), file_format, exif=exif, **options))
    assert np.abs(picture.array.astype(int) - ramp()).max() <= (4 if file_format == "JPEG" else 0)
    assert picture.exif_orientation == orientation
    assert (picture.original_height, picture.original_width) == stored.shape[:2]
    assert (picture.height, picture.width) == (HEIGHT, WIDTH)


def test_an_invalid_orientation_counts_as_none() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    picture = decode(saved(Image.fromarray(ramp()), "PNG", exif=exif))
    assert picture.exif_orientation == 1
    assert np.array_equal(picture.array, ramp())


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = saved(Image.fromarray(ramp()).convert("CMYK"), "JPEG", quality=98)
    picture = decode(data)
    assert picture.channels == 4
    assert np.abs(picture.array.astype(int) - ramp()).mean() < 3


def test_alpha_is_composited_on_the_background_and_hidden_colour_does_not_leak() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0] = (255, 0, 0, 0)
    rgba[:, 1] = (255, 0, 0, 255)
    rgba[:, 2] = (0, 0, 0, 51)
    data = saved(Image.fromarray(rgba), "PNG")
    picture = decode(data)
    assert picture.had_alpha
    assert picture.array[0].tolist() == [[255, 255, 255], [255, 0, 0], [204, 204, 204]]
    assert decode(data, PixelPolicy(background=(0, 0, 255))).array[0, 0].tolist() == [0, 0, 255]


def test_grey_with_alpha_is_composited() -> None:
    grey_alpha = np.array([[[0, 0], [100, 255]]], np.uint8)
    picture = decode(saved(Image.fromarray(grey_alpha, mode="LA"), "PNG"))
    assert picture.array[0].tolist() == [[255] * 3, [100] * 3]


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette_transparency_is_composited(file_format: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    picture = decode(saved(image, file_format, transparency=0))
    assert picture.had_alpha
    assert picture.array[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_a_transparent_colour_of_an_rgb_png_is_composited() -> None:
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    picture = decode(saved(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)))
    assert picture.array[0].tolist() == [[255, 255, 255], [4, 5, 6]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(file_format: str) -> None:
    values = np.array([[0, 257, 256 * 128, 65535, 300, 65407]], np.uint16)
    picture = decode(saved(Image.fromarray(values), file_format))
    assert picture.bit_depth == 16
    expected = np.rint(values / 257).astype(int)
    assert picture.array[..., 0].tolist() == expected.tolist()
    assert (picture.array[..., 0] == picture.array[..., 2]).all()


def test_sixteen_bit_grey_with_a_transparent_level() -> None:
    values = np.array([[1000, 1001]], np.uint16)
    picture = decode(saved(Image.fromarray(values), "PNG", transparency=1000))
    assert picture.had_alpha
    assert picture.array[0, :, 0].tolist() == [255, 4]


def noise16(*channels: int) -> NDArray[np.uint16]:
    """Every kind of 16-bit sample, not in order: uint16 [24, 40, *channels]."""
    return np.random.default_rng(16).integers(0, 65536, (HEIGHT, WIDTH, *channels), dtype=np.uint16)


def eighth(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.rint(values / 257).astype(np.uint8)


def png16(values: NDArray[np.uint16], colour_type: int, *chunks: bytes) -> bytes:
    """A 16-bit PNG of [H, W, C]."""
    rows = values.astype(">u2").reshape(len(values), -1)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff16(values: NDArray[np.uint16], photometric: int, bits: int = 16, planar: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of uint16 [H, W] or [H, W, 3]; 12 bits are packed."""
    samples = 1 if values.ndim == 2 else values.shape[2]
    body = np.moveaxis(values, -1, 0) if planar == 2 else values
    data = body.astype("<u2").tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        whole = (pairs[:, 0] << 12) | pairs[:, 1]
        data = b"".join(int(each).to_bytes(3, "big") for each in whole)
    strips = samples if planar == 2 else 1
    tags = [(256, values.shape[1]), (257, values.shape[0]), (259, 1), (262, photometric), (277, samples)]
    tags += [(278, values.shape[0]), (284, planar)]
    end = 8 + 2 + 12 * (len(tags) + 3) + 4
    lists = {258: (3, [bits] * samples), 273: (4, []), 279: (4, [len(data) // strips] * strips)}
    start = end + sum(0 if len(each) == 1 else len(each) * 4 for each in ([bits] * samples, [0] * strips, [0] * strips))
    lists[273] = (4, [start + number * (len(data) // strips) for number in range(strips)])
    entries, extra = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags}, b""
    for tag, (_, each) in lists.items():
        if len(each) == 1:
            entries[tag] = struct.pack("<HHII", tag, 4, 1, each[0])
        else:
            entries[tag] = struct.pack("<HHII", tag, 4, len(each), end + len(extra))
            extra += struct.pack(f"<{len(each)}I", *each)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + extra + data


def opencv(values: NDArray[np.uint16], suffix: str, *options: int) -> bytes:
    """OpenCV's file of RGB or RGBA."""
    order = [2, 1, 0, 3][: values.shape[2]]
    return bytes(cv2.imencode(suffix, values[..., order], options)[1])


RAW = (cv2.IMWRITE_TIFF_COMPRESSION, 1)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(opencv(noise16(3), ".png"), id="png"),
        pytest.param(opencv(noise16(3), ".tiff"), id="packed tiff"),
        pytest.param(opencv(noise16(3), ".tiff", *RAW), id="tiff"),
        pytest.param(tiff16(noise16(3), 2), id="another tiff"),
        pytest.param(png16(noise16(3), 2), id="another png"),
    ],
)
def test_sixteen_bit_colours_are_rounded_not_cut(data: bytes) -> None:
    picture = decode(data)
    assert picture.bit_depth == 16
    assert np.array_equal(picture.array, eighth(noise16(3)))
    assert not np.array_equal(picture.array, noise16(3) >> 8)
    assert read_facts(data) == picture.facts()


@pytest.mark.parametrize("grey", [False, True], ids=["colours", "grey"])
def test_sixteen_bit_transparency_is_rounded_and_composited(grey: bool) -> None:
    values = noise16(2 if grey else 4)
    data = png16(values, 4 if grey else 6)
    colours = eighth(values[..., [0, 0, 0]] if grey else values[..., :3])
    alpha = eighth(values[..., -1:]) / 255
    picture = decode(data)
    assert (picture.bit_depth, picture.had_alpha) == (16, True)
    assert np.abs(picture.array - (colours * alpha + 255 * (1 - alpha))).max() <= 1


def test_the_transparent_colour_of_a_sixteen_bit_png_is_one_of_16_bits() -> None:
    values = noise16(3)
    values[0, 0], values[0, 1] = (257, 514, 771), (257, 514, 772)
    picture = decode(png16(values, 2, png_chunk(b"tRNS", struct.pack(">HHH", 257, 514, 771))))
    assert picture.had_alpha
    assert picture.array[0, :2].tolist() == [[255, 255, 255], [1, 2, 3]]


@pytest.mark.parametrize(("bits", "photometric"), [(16, 0), (16, 1), (12, 1)])
def test_grey_of_a_tiff_is_scaled_from_its_own_white(bits: int, photometric: int) -> None:
    values = noise16() >> (16 - bits)
    white = (1 << bits) - 1
    levels = white - values if photometric == 0 else values
    picture = decode(tiff16(values, photometric, bits))
    assert picture.bit_depth == bits
    assert np.array_equal(picture.array[..., 0], np.rint(levels / white * 255).astype(np.uint8))


def test_a_tiff_with_separate_planes_of_sixteen_bits_is_refused_rather_than_misread() -> None:
    assert code_of(tiff16(noise16(3), 2, planar=2)) == "unsupported_format"


def test_thirty_two_bit_pictures_are_refused_rather_than_guessed() -> None:
    assert code_of(saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")) == "unsupported_format"


def test_one_bit_pictures_become_black_and_white() -> None:
    picture = decode(saved(Image.fromarray(np.array([[True, False]])), "PNG"))
    assert picture.bit_depth == 1
    assert picture.array[0, :, 0].tolist() == [255, 0]


def swapped_profile() -> bytes:
    """An sRGB profile whose red and green primaries are exchanged, by its own tag table."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for position in range(132, 132 + 12 * count, 12):
        tag = bytes(profile[position : position + 4])
        if tag in (b"rXYZ", b"gXYZ"):
            profile[position : position + 4] = b"gXYZ" if tag == b"rXYZ" else b"rXYZ"
    return bytes(profile)


def test_an_icc_profile_is_converted_to_srgb() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = decode(saved(Image.fromarray(ramp()), "PNG", icc_profile=profile))
    assert picture.icc_profile
    assert np.abs(picture.array.astype(int) - ramp()).max() <= 1
    swapped = decode(saved(Image.fromarray(ramp()), "PNG", icc_profile=swapped_profile()))
    assert np.abs(swapped.array.astype(int) - ramp()[..., [1, 0, 2]]).max() <= 2


def icc(space: bytes, connection: bytes, **tags: bytes) -> bytes:
    """A small ICC profile, version 2.4; tags are padded to four letters."""
    fixed = [int(value * 65536) for value in (0.9642, 1.0, 0.8249)]
    tags = {"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", *fixed), **tags}
    position, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name.encode() + struct.pack(">II", position + len(body), len(data))
        body += data
    header = struct.pack(
        ">III4s4s4s12s4s", position + len(body), 0, 0x02400000, b"prtr", space, connection, b"", b"acsp"
    )
    header += bytes(28) + struct.pack(">3i", *fixed)
    return header.ljust(128, b"\0") + table + body


def linear_grey_profile() -> bytes:
    """Grey whose samples are linear light."""
    return icc(b"GRAY", b"XYZ ", kTRC=b"curv" + bytes(4) + struct.pack(">IH", 1, 256) + bytes(2))


def grey_ink_profile() -> bytes:
    """CMYK whose inks are all grey: black takes all light, each of the others a third."""
    ramps = bytes(range(256))
    nodes = (
        bytes([round(255 * (1 - black) * (1 - (cyan + magenta + yellow) / 3)), 128, 128])
        for cyan, magenta, yellow, black in itertools.product((0, 1), repeat=4)
    )
    identity = struct.pack(">9i", *(65536 if at in (0, 4, 8) else 0 for at in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramps * 4 + b"".join(nodes) + ramps * 3
    return icc(b"CMYK", b"Lab ", A2B0=table)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
def test_a_grey_profile_is_converted_as_grey(file_format: str) -> None:
    grey = Image.new("L", (16, 16), 128)
    picture = decode(saved(grey, file_format, icc_profile=linear_grey_profile()))
    assert (picture.icc_profile, picture.icc_broken, picture.channels) == (True, False, 1)
    assert np.abs(picture.array.astype(int) - 188).max() <= 1, "half of the light is 188 in sRGB"


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_a_cmyk_profile_decides_what_inks_are(file_format: str) -> None:
    options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
    for inks, level in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((255, 0, 0, 0), 162), ((0, 255, 0, 0), 162)):
        data = saved(Image.new("CMYK", (16, 16), inks), file_format, icc_profile=grey_ink_profile(), **options)
        picture = decode(data)
        assert (picture.icc_profile, picture.icc_broken, picture.channels) == (True, False, 4)
        assert np.abs(picture.array.astype(int) - level).max() <= 3


def test_an_icc_profile_keeps_transparency() -> None:
    rgba = np.array([[[9, 9, 9, 0], [200, 10, 10, 255]]], np.uint8)
    picture = decode(saved(Image.fromarray(rgba), "PNG", icc_profile=swapped_profile()))
    assert picture.array[0, 0].tolist() == [255, 255, 255]
    assert picture.array[0, 1, 1] > 190


def test_a_broken_or_unfitting_profile_is_ignored_and_recorded() -> None:
    picture = decode(saved(Image.fromarray(ramp()), "PNG", icc_profile=b"no profile at all" * 20))
    assert (picture.icc_profile, picture.icc_broken) == (False, True)
    assert np.array_equal(picture.array, ramp())


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (8, 6), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(file_format: str) -> None:
    first, *others = frames()
    picture = decode(saved(first, file_format, save_all=True, append_images=others))
    assert picture.animated
    assert np.abs(picture.array.astype(int) - (250, 0, 0)).max() <= 6


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_cut_file_is_refused_wherever_it_is_cut(file_format: str) -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noisy), file_format)
    # The last bytes of a GIF, TIFF or BMP may be an end mark or padding, after the last pixel.
    slack = {"GIF": 8, "TIFF": 8, "BMP": 8}.get(file_format, 1)
    for length in [*range(30, len(data) - slack, max(1, len(data) // 60)), len(data) - slack]:
        assert code_of(data[:length]) in {"truncated", "corrupt"}, length


def test_a_cut_progressive_jpeg_is_truncated() -> None:
    data = saved(Image.fromarray(ramp()), "JPEG", progressive=True)
    assert {code_of(data[:length]) for length in (len(data) // 2, len(data) - 1)} == {"truncated"}


def test_trailing_bytes_of_a_jpeg_are_accepted() -> None:
    assert decode(encode_jpeg(ramp()) + b"trailing" * 10).array.shape == (HEIGHT, WIDTH, 3)


def test_a_flipped_bit_anywhere_in_the_pixels_of_a_png_is_corrupt() -> None:
    data = encode_png(ramp())
    start = data.index(b"IDAT") + 4
    for position in range(start, data.index(b"IEND") - 8, 7):
        damaged = bytearray(data)
        damaged[position] ^= 4
        assert code_of(bytes(damaged)) == "corrupt"


def test_random_damage_raises_nothing_but_picture_errors() -> None:
    generator = np.random.default_rng(7)
    image = Image.fromarray(ramp())
    files = [saved(image, "JPEG"), saved(image, "PNG"), saved(image, "GIF"), saved(image, "WEBP")]
    for data in files:
        for _ in range(60):
            damaged = np.frombuffer(data, np.uint8).copy()
            where = generator.integers(0, len(data), generator.integers(1, 9))
            damaged[where] = generator.integers(0, 256, len(where))
            try:
                assert decode(damaged.tobytes()).array.ndim == 3
            except PictureError as error:
                assert error.code in CODES


def test_zero_bytes_and_text_and_foreign_formats_have_their_own_codes() -> None:
    assert code_of(b"") == "empty"
    assert code_of(b"this is a text that somebody named holiday.jpg") == "not_an_image"
    assert code_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not_an_image"
    assert code_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n") == "unsupported_format"
    assert code_of(b"SIMPLE  =                    T" + b" " * 2850) == "unsupported_format"
    assert code_of(encode_png(ramp()), PixelPolicy(formats=("JPEG",))) == "unsupported_format"
    assert code_of(encode_png(ramp()), PixelPolicy(max_bytes=10)) == "too_large"


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (14_000, 14_000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_from_its_header(width: int, height: int) -> None:
    assert code_of(png_header(width, height)) == "too_many_pixels"


def gif_bomb(screen: int, frame: int) -> bytes:
    """A GIF of two colours whose screen and whose frame are squares of these sides, with the pixels of none."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\2\2\x44\1\0;"


def webp_bomb(animated: bool) -> bytes:
    """A lossless WebP of a few bytes; its header, or that of its canvas, announces the largest square there is."""
    blank = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"save_all": True, "append_images": blank[1:]} if animated else {}
    data = bytearray(saved(blank[0], "WEBP", lossless=True, **options))
    if animated:
        at = data.index(b"VP8X") + 12
        data[at : at + 6] = (16383).to_bytes(3, "little") * 2
    else:
        at = data.index(b"VP8L") + 9
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "little") | 0xFFF_FFFF).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(gif_bomb(65_535, 4), id="screen of a gif"),
        pytest.param(gif_bomb(4, 65_535), id="frame of a gif"),
        pytest.param(webp_bomb(False), id="webp"),
        pytest.param(webp_bomb(True), id="canvas of a webp"),
    ],
)
def test_bombs_in_other_formats_are_refused_before_a_pixel_is_decoded(data: bytes) -> None:
    assert len(data) < 200
    assert code_of(data) == "too_many_pixels"


def test_the_pixel_limit_is_inclusive() -> None:
    data = encode_png(ramp())
    assert decode(data, PixelPolicy(max_pixels=HEIGHT * WIDTH)).width == WIDTH
    assert code_of(data, PixelPolicy(max_pixels=HEIGHT * WIDTH - 1)) == "too_many_pixels"


def test_warnings_turned_into_errors_change_no_verdict() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_of(png_header(10_000, 10_000)) == "too_many_pixels"
        image = Image.new("P", (2, 1))
        assert decode(saved(image, "PNG", transparency=b"\x00\xff")).had_alpha
        with pytest.raises(UserWarning):
            warnings.warn("filters are as they were", stacklevel=1)


def test_the_digest_follows_every_field_but_not_the_order_of_formats() -> None:
    default = PixelPolicy().digest()
    others = [
        PixelPolicy(max_pixels=1000),
        PixelPolicy(max_bytes=1000),
        PixelPolicy(formats=("JPEG",)),
        PixelPolicy(background=(0, 0, 0)),
    ]
    assert len({default, *(policy.digest() for policy in others)}) == 5
    assert PixelPolicy(formats=tuple(reversed(FORMATS))).digest() == default


def test_policies_that_cannot_be_kept_are_usage_errors() -> None:
    for fields in ({"max_pixels": 0}, {"max_pixels": 10**9}, {"formats": ("EPS",)}, {"formats": ()}):
        with pytest.raises(UsageError):
            PixelPolicy(**fields)
    with pytest.raises(UsageError):
        PixelPolicy(background=(256, 0, 0))


def test_a_picture_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PictureError("corrupt", "because")))
    assert (error.code, error.message, str(error)) == ("corrupt", "because", "corrupt: because")


def every_kind() -> dict[str, bytes]:
    """Files whose facts differ in some way."""
    image, small = Image.fromarray(ramp()), Image.fromarray(ramp()[:6, :8])
    exif = Image.Exif()
    exif[0x0112] = 6
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = {file_format: saved(image, file_format) for file_format in FORMATS}
    found |= {f"turned {name}": saved(image, name, exif=exif) for name in ("JPEG", "PNG", "TIFF", "WEBP")}
    found |= {f"mode {mode}": saved(image.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")}
    found |= {
        "cmyk": saved(image.convert("CMYK"), "JPEG"),
        "cmyk profile": saved(image.convert("CMYK"), "JPEG", icc_profile=srgb),
        "cmyk tiff": saved(image.convert("CMYK"), "TIFF"),
        "lab": saved(image.convert("LAB"), "TIFF"),
        "ycc": saved(image.convert("YCbCr"), "TIFF"),
        "grey 16": saved(Image.fromarray(ramp()[..., 0].astype(np.uint16) * 257), "PNG"),
        "float": saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
        "profile": saved(image, "JPEG", icc_profile=srgb),
        "grey profile": saved(image.convert("L"), "PNG", icc_profile=srgb),
        "swapped": saved(image, "PNG", icc_profile=swapped_profile()),
        "broken profile": saved(image, "PNG", icc_profile=b"no profile" * 30),
        "transparent palette": saved(image.convert("P"), "PNG", transparency=b"\x00\x80"),
        "transparent colour": saved(image, "PNG", transparency=(0, 0, 0)),
        "animation": saved(small, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6))]),
        "bomb": png_header(100_000, 100_000),
        "nothing": b"",
        "text": b"no picture",
    }
    return found


def verdict(function: Any, data: bytes) -> Any:
    try:
        found = function(data)
    except PictureError as error:
        return error.code, error.message
    return found.facts() if isinstance(found, Picture) else found


@pytest.mark.parametrize("name", sorted(every_kind()))
def test_facts_alone_are_those_of_the_decoded_picture(name: str) -> None:
    data = every_kind()[name]
    assert verdict(read_facts, data) == verdict(decode, data)


def test_facts_of_damaged_files_are_refused_as_decoding_does() -> None:
    generator = np.random.default_rng(11)
    for name, data in every_kind().items():
        for _ in range(6):
            damaged = np.frombuffer(data, np.uint8).copy()
            if len(data) > 40:
                where = generator.integers(0, len(data), 5)
                damaged[where] = generator.integers(0, 256, 5)
            cut = damaged.tobytes()[: generator.integers(len(data) // 2, len(data) + 1)]
            assert verdict(read_facts, cut) == verdict(decode, cut), name


def jpegs() -> Iterator[bytes]:
    """A small picture in each kind of JPEG that Pillow writes."""
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (37, 51, 3), np.uint8)).resize((101, 75))
    kinds = itertools.product(("RGB", "L", "CMYK"), ("4:4:4", "4:2:0"), (False, True), (0, 2))
    for mode, subsampling, progressive, restart in kinds:
        buffer = io.BytesIO()
        options = {"subsampling": subsampling, "progressive": progressive, "restart_marker_blocks": restart}
        picture.convert(mode).save(buffer, "JPEG", quality=85, **options)
        yield buffer.getvalue()


def test_a_jpeg_decoded_at_an_eighth_fails_where_it_fails_at_full_size() -> None:
    generator = np.random.default_rng(3)
    refused = 0
    for data in jpegs():
        for _ in range(40):
            damaged = np.frombuffer(data, np.uint8).copy()
            where = generator.integers(2, len(data), generator.integers(0, 4))
            damaged[where] = generator.integers(0, 256, len(where))
            cut = damaged.tobytes()[: generator.choice([len(data), generator.integers(2, len(data))])]
            assert verdict(read_facts, cut) == verdict(decode, cut)
            refused += isinstance(verdict(decode, cut), tuple)
    assert 200 < refused < 900
