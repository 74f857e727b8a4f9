"""The one way bytes become pixels: scoring, training, evaluation and the registered model all decode here.

A picture is ``uint8 [H, W, 3]``, RGB, sRGB, upright. What is declared, in this order:

1. only allow-listed formats are opened, the content decides, never a file name;
2. a picture over ``max_pixels`` is refused from its header, before a pixel is decoded;
3. the whole first frame must decode: cut or damaged files are refused, never padded with grey;
4. samples of 16 bits (12 in a TIFF) are scaled to 8 bits and rounded, ``round(v / 257)``, never clipped or cut;
5. an embedded ICC profile is converted to sRGB; a broken one is ignored;
6. transparency is composited on ``background``;
7. the EXIF orientation is applied.
"""

import dataclasses
import io
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from iqpir.config import digest
from iqpir.errors import UsageError

RULES_VERSION = 2
"""Raise it when this module decodes any picture to other pixels; it is part of every policy's digest."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""Formats a policy may allow."""

PictureCode = Literal[
    "empty", "too_large", "not_an_image", "unsupported_format", "too_many_pixels", "truncated", "corrupt"
]
CODES: tuple[PictureCode, ...] = get_args(PictureCode)
"""Every ``PictureError.code``."""

# Pillow itself raises DecompressionBombError above twice its MAX_IMAGE_PIXELS of 89,478,485.
_PILLOW_CEILING = 178_956_970

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"(II[*+]\x00|MM\x00[*+])", "TIFF"),
    (rb"BM", "BMP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"8BPS", "PSD"),
    (rb"%!PS", "EPS"),
    (rb"%PDF", "PDF"),
    (rb"SIMPLE  =", "FITS"),
    (rb"....ftyp", "AVIF/HEIF"),
    (rb"(\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51)", "JPEG2000"),
    (rb"\x00\x00[\x01\x02]\x00", "ICO"),
)

# What Pillow's decoders raise on damaged files; anything else is a bug that must be seen.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)

_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN_MODES = ("RGB", "L", "CMYK")
"""Modes of frames whose colours convert without a look at the pixels."""
_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_PHOTOMETRIC_TAG = 262
_WHITE_IS_ZERO = 0
_PLANAR_TAG = 284
_PLANES_APART = 2

_SWAPPED = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
"""Raw modes by which Pillow keeps the other byte of each 16-bit sample than the high one."""


class PictureError(ValueError):
    """These bytes are no picture under the policy.

    Attributes:
        code: one of ``CODES``; stable, fit for a column.
        message: one sentence for people.
    """

    def __init__(self, code: PictureCode, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(code, message)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class PixelPolicy:
    """What may be decoded; the rest of the policy is fixed by this module (``RULES_VERSION``)."""

    max_pixels: int = 50_000_000
    """Largest width * height that is decoded; larger pictures are refused from their header."""
    max_bytes: int = 64 * 2**20
    """Largest encoded size in bytes."""
    formats: tuple[str, ...] = FORMATS
    """Formats that are opened; the content decides, not the file name."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB colour, 0 to 255, that shows through transparent pixels."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= _PILLOW_CEILING:
            raise UsageError(
                f"max_pixels {self.max_pixels} is outside 1..{_PILLOW_CEILING}.",
                "Tile larger pictures first.",
            )
        if self.max_bytes < 1:
            raise UsageError(f"max_bytes {self.max_bytes} is not positive.")
        unknown = sorted(set(self.formats) - set(FORMATS))
        if unknown or not self.formats:
            raise UsageError(
                f"formats {unknown or 'is empty'} cannot be decoded.", f"Choose among {', '.join(FORMATS)}."
            )
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise UsageError(f"background {self.background} is not three values in 0..255.")

    def digest(self) -> str:
        """12 hex digits that change with any field or rule; part of every score's fingerprint."""
        fields = dataclasses.asdict(self)
        fields["formats"] = sorted(self.formats)
        return digest({"rules": RULES_VERSION, **fields})


@dataclass(frozen=True, eq=False, kw_only=True)
class Picture:
    """A decoded picture and what was found in its file."""

    array: NDArray[np.uint8]
    """``uint8 [height, width, 3]``, RGB, sRGB, upright, writable."""
    format: str
    """One of ``FORMATS``."""
    width: int
    height: int
    original_width: int
    """As stored, before the EXIF orientation was applied."""
    original_height: int
    bit_depth: int
    """Bits per channel in the file, 1 to 16; 16 means the pixels were reduced to 8."""
    channels: int
    """Channels in the file; a palette counts as one."""
    exif_orientation: int
    """1 to 8; 1 also when there is none or an invalid one."""
    icc_profile: bool
    """Whether an embedded profile was converted to sRGB."""
    icc_broken: bool
    """Whether an embedded profile could not be used, and sRGB was assumed."""
    had_alpha: bool
    """Whether the file has transparency (channel or palette)."""
    animated: bool
    """Whether the file has more than one frame or page; the first is taken."""

    def facts(self) -> dict[str, Any]:
        """Every field but ``array``: plain JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "array"}


def decode(data: bytes, policy: PixelPolicy | None = None) -> Picture:
    """Decode one picture.

    Args:
        data: an encoded picture.
        policy: what is allowed; the default policy if None.

    Raises:
        PictureError: the bytes are no complete picture under the policy.
    """
    policy = policy or PixelPolicy()
    _require_size(data, policy)
    with _pillow_warnings_ignored():
        loaded = _load(data, policy)
        return _picture(loaded, data, policy)


def read_facts(data: bytes, policy: PixelPolicy | None = None) -> dict[str, Any]:
    """``Picture.facts`` of one picture, which is decoded as by ``decode`` and not kept: cheaper where bytes pass on.

    Args:
        data: an encoded picture.
        policy: what is allowed; the default policy if None.

    Raises:
        PictureError: exactly where ``decode`` raises it.
    """
    policy = policy or PixelPolicy()
    _require_size(data, policy)
    with _pillow_warnings_ignored():
        loaded = _load(data, policy, small=True)
        use = _profile_use(loaded.image)
        if use is None:
            return _picture(loaded, data, policy).facts()
        return _facts(loaded, data, use)


def encode_png(array: NDArray[np.uint8], compression: int = 6) -> bytes:
    """PNG bytes of ``uint8 [H, W, 3]``; the same array and Pillow give the same bytes.

    Args:
        array: an RGB picture.
        compression: zlib level, 0 (fast) to 9 (small).
    """
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=compression)
    return buffer.getvalue()


def encode_jpeg(array: NDArray[np.uint8], quality: int = 95) -> bytes:
    """JPEG bytes of ``uint8 [H, W, 3]`` at ``quality`` 1 to 100, chroma subsampled 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _require_size(data: bytes, policy: PixelPolicy) -> None:
    if not data:
        raise PictureError("empty", "There are no bytes.")
    if len(data) > policy.max_bytes:
        raise PictureError("too_large", f"{len(data)} bytes are more than {policy.max_bytes}.")


@contextmanager
def _pillow_warnings_ignored() -> Iterator[None]:
    """Pillow warns about metadata and sizes that the policy judges itself; ``-W error`` would raise these.

    Warning filters are process-wide: a race of two threads can at worst leave these two filters installed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", module=re.escape(__name__))
        yield


@dataclass(frozen=True, eq=False)
class _Loaded:
    """The first frame with its pixels decoded, before any conversion."""

    image: Image.Image
    size: tuple[int, int]
    """Width and height of the picture, whatever the size at which it was decoded."""
    animated: bool
    stored_orientation: int
    pending_orientation: int
    """1 where Pillow has turned the frame while loading, as it does with TIFF."""
    raw_mode: str = ""
    """What Pillow calls the form of the samples in the file, such as ``RGB;16B``."""


def _load(data: bytes, policy: PixelPolicy, *, small: bool = False) -> _Loaded:
    """Open and decode the first frame; ``small``: a JPEG at an eighth of its size.

    Raises:
        PictureError: it does not open, is too large, or does not decode to its end.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=policy.formats)
        _refuse_bomb(image, policy)
        if image.format == "PNG":
            _check_png(data)
        animated = bool(getattr(image, "is_animated", False))
        before = _orientation(image) if image.format == "TIFF" else None
        size = _drafted(image) if small else None
        raw_mode = _raw_mode(image)
        image.load()
    except PictureError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _refusal(data, policy, error) from error
    except _DECODER_ERRORS as error:
        code: PictureCode = "truncated" if _is_cut(data) or "truncated" in str(error) else "corrupt"
        raise PictureError(code, f"The {_signature(data)} data does not decode ({error}).") from error
    pending = _orientation(image)
    return _Loaded(image, size or image.size, animated, pending if before is None else before, pending, raw_mode)


def _raw_mode(image: Image.Image) -> str:
    """``_Loaded.raw_mode`` of a frame that is not loaded yet.

    Raises:
        PictureError: a TIFF with 16-bit planes one after another, which Pillow takes for planes of 8 bits.
    """
    tiles = getattr(image, "tile", ())
    arguments = tiles[0].args if tiles else ""
    raw_mode = str(arguments if isinstance(arguments, str) else (arguments or ("",))[0])
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PLANAR_TAG) == _PLANES_APART and max(tags.get(_BITS_PER_SAMPLE_TAG, (1,))) > 8:
        raise PictureError("unsupported_format", "A TIFF with separate planes of 16 bits is not read.")
    return raw_mode


def _drafted(image: Image.Image) -> tuple[int, int] | None:
    """The size of a JPEG that will now be decoded at an eighth of it; None for what is decoded whole.

    All of the data is still read, so it fails where it would at full size, in two thirds of the time.
    """
    if image.format != "JPEG" or image.mode not in _PLAIN_MODES:
        return None
    size = image.size
    image.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
    return size


def _refuse_bomb(image: Image.Image, policy: PixelPolicy) -> None:
    if image.width * image.height > policy.max_pixels:
        raise PictureError(
            "too_many_pixels", f"{image.width} x {image.height} is more than {policy.max_pixels} pixels."
        )


def _refusal(data: bytes, policy: PixelPolicy, error: Exception) -> PictureError:
    """Why Pillow opened nothing."""
    if isinstance(error, Image.DecompressionBombError):
        return PictureError("too_many_pixels", f"The header announces more than {policy.max_pixels} pixels.")
    name = _signature(data)
    if name in policy.formats:
        code: PictureCode = "truncated" if _is_cut(data) else "corrupt"
        return PictureError(code, f"The {name} header cannot be read.")
    if name:
        return PictureError("unsupported_format", f"{name} is not among {', '.join(policy.formats)}.")
    return PictureError("not_an_image", "The content is no known picture format.")


def _signature(data: bytes) -> str:
    """Name of the format that the first bytes announce, or ''."""
    for pattern, name in _SIGNATURES:
        if re.match(pattern, data[:16], re.DOTALL):
            return name
    return ""


def _is_cut(data: bytes) -> bool:
    """Whether the end that the format announces is missing (TIFF announces none)."""
    name = _signature(data)
    if name == "JPEG":
        return b"\xff\xd9" not in data[-65_536:]
    if name == "PNG":
        return b"IEND\xaeB`\x82" not in data[-65_536:]
    if name == "GIF":
        return not data.endswith(b"\x3b")
    if name == "WEBP":
        return len(data) < 12 or 8 + int.from_bytes(data[4:8], "little") > len(data)
    if name == "BMP":
        return len(data) < 54 or int.from_bytes(data[2:6], "little") > len(data)
    return False


def _check_png(data: bytes) -> None:
    """Check the CRC of every critical PNG chunk up to IEND: Pillow skips that of the pixels.

    Raises:
        PictureError: ``truncated`` without a whole IEND, ``corrupt`` at a wrong CRC.
    """
    view, position = memoryview(data), 8
    while position + 12 <= len(data):
        length = int.from_bytes(view[position : position + 4], "big")
        kind = bytes(view[position + 4 : position + 8])
        end = position + 12 + length
        if end > len(data):
            break
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise PictureError("corrupt", f"The checksum of PNG chunk {kind!r} is wrong.")
        if kind == b"IEND":
            return
        position = end
    raise PictureError("truncated", "The PNG data ends before its IEND chunk.")


def _picture(loaded: _Loaded, data: bytes, policy: PixelPolicy) -> Picture:
    """Colours and orientation of a loaded frame made uniform."""
    facts = _facts(loaded, data, (False, False))
    try:
        colours, alpha, used, broken = _to_srgb(_rounded(loaded, data, policy))
    except PictureError:
        raise
    except _DECODER_ERRORS as error:
        raise PictureError("corrupt", f"The colours do not convert to RGB ({error}).") from error
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, policy.background), alpha)
    if loaded.pending_orientation in _UPRIGHT:
        colours = colours.transpose(_UPRIGHT[loaded.pending_orientation])
    return Picture(**{**facts, "icc_profile": used, "icc_broken": broken}, array=np.array(colours, dtype=np.uint8))


def _rounded(loaded: _Loaded, data: bytes, policy: PixelPolicy) -> Image.Image:
    """The frame with 16-bit colours rounded to 8 bits: Pillow keeps the high byte of each, so both are read.

    Left as Pillow has them: premultiplied colours of a TIFF, which it divides by alpha while it reads.
    """
    image, (name, _, order) = loaded.image, loaded.raw_mode.partition(";")
    if order not in _SWAPPED or image.mode.startswith("I;16") or name == "RGBa":
        return image
    again = Image.open(io.BytesIO(data), formats=policy.formats)
    both = name == "LA"  # PNG: no raw mode has its low bytes alone, four raw bytes are both samples
    raw_mode = "RGBA" if both else f"{name};{_SWAPPED[order]}"
    again.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *(tile.args or ())[1:]))
        for tile in again.tile
    ]
    again.load()
    high, low = np.asarray(image), np.asarray(again)
    if both:
        low = low[..., [1, 1, 1, 3]]
    # v = 256 high + low = 257 high + (low - high), so v / 257 rounds to high or to its neighbour.
    excess = low.astype(np.int16) - high
    samples = (high + (excess > 128) - (excess < -128)).astype(np.uint8)
    rounded = Image.frombytes(image.mode, image.size, samples.tobytes())
    rounded.info = {key: value for key, value in image.info.items() if key != "transparency"}
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple):
        clear = ((high == np.array(key) >> 8) & (low == np.array(key) & 255)).all(axis=-1)
        rounded.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return rounded


def _facts(loaded: _Loaded, data: bytes, profile: tuple[bool, bool]) -> dict[str, Any]:
    """``Picture.facts`` of a loaded frame; ``profile``: whether one is used, whether it is broken."""
    image, stored, pending = loaded.image, loaded.stored_orientation, loaded.pending_orientation
    turned = loaded.size[::-1]
    width, height = turned if pending >= 5 else loaded.size
    original = turned if stored >= 5 and pending == 1 else loaded.size
    return {
        "format": "JPEG" if image.format == "MPO" else str(image.format),
        "width": width,
        "height": height,
        "original_width": original[0],
        "original_height": original[1],
        "bit_depth": _bit_depth(image, data),
        "channels": len(image.getbands()),
        "exif_orientation": stored,
        "icc_profile": profile[0],
        "icc_broken": profile[1],
        "had_alpha": image.has_transparency_data,
        "animated": loaded.animated,
    }


def _profile_use(image: Image.Image) -> tuple[bool, bool] | None:
    """Whether the profile of a frame is used, whether it is broken; None where only converting the pixels tells.

    Frames of these modes convert whenever a transform can be made.
    """
    if image.mode not in _PLAIN_MODES or image.has_transparency_data:
        return None
    profile = image.info.get("icc_profile")
    if not profile:
        return False, False
    try:
        _fitting_transform(profile, image.mode)
    except _PROFILE_ERRORS:
        return False, True
    return True, False


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; damaged metadata counts as none."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _bit_depth(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, (1,))
        return int(max(bits)) if isinstance(bits, tuple) else int(bits)
    return 1 if image.mode == "1" else 8


def _to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None, bool, bool]:
    """RGB colours, alpha (mode L) or None, whether a profile was used, whether it was broken."""
    profile = image.info.get("icc_profile")
    image, alpha = _split_alpha(_to_8_bits(image))
    if not profile:
        return _plain_rgb(image), alpha, False, False
    try:
        mode, transform = _fitting_transform(profile, image.mode)
        converted = transform.apply(image if image.mode == mode else image.convert(mode))
    except _PROFILE_ERRORS:
        return _plain_rgb(image), alpha, False, True
    return converted, alpha, True, False


def _fitting_transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform]:
    """The mode that a frame of ``mode`` has to have, and the transform from there to sRGB."""
    fits = (_colour_space(profile), mode) in {("GRAY", "L"), ("CMYK", "CMYK")}
    return (mode, _transform(profile, mode)) if fits else ("RGB", _transform(profile, "RGB"))


@lru_cache(maxsize=16)
def _colour_space(profile: bytes) -> str:
    """``RGB``, ``GRAY``, ``CMYK``, ... as an ICC profile says."""
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """From pictures of ``mode`` under an ICC profile to sRGB, perceptual; corpora share few profiles."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _plain_rgb(image: Image.Image) -> Image.Image:
    """RGB without a profile; CIE L*a*b* (TIFF) goes through littlecms."""
    if image.mode != "LAB":
        return image.convert("RGB")
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits scaled to mode L (LA where one grey is declared transparent); other modes as they are.

    Raises:
        PictureError: integers or floats of 32 bits, which declare no white.
    """
    if image.mode in ("I", "F"):
        raise PictureError("unsupported_format", f"Mode {image.mode} (32 bits) declares no white.")
    if not image.mode.startswith("I;16"):
        return image
    raw, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
    white = (1 << int(tags.get(_BITS_PER_SAMPLE_TAG, (16,))[0])) - 1
    levels = white - raw if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO else raw
    grey = Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(raw == transparent, 0, 255).astype(np.uint8)))
    return grey


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency (palettes become RGB), and alpha (mode L) or None."""
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return (image.convert("RGB") if image.mode in ("P", "PA") else image), None
