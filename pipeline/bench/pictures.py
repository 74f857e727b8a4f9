"""Real pictures in any number and size: crops of those that scikit-image ships, the same every time."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iqpir.errors import UsageError
from pipeline.bench.measure import Source

NAMES = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg"),
    *("ihc.png", "motorcycle_left.png"),
)
JPEG_QUALITY = 95
_KEY = 0x62656E6368


def picture(number: int, size: int) -> NDArray[np.uint8]:
    """Picture ``number``, uint8 RGB [size, size, 3]: a crop of a real one at a drawn place and scale."""
    random = np.random.Generator(np.random.Philox(key=[_KEY, number]))
    source = _sources()[number % len(NAMES)]
    scale = max(size / min(source.size), float(random.uniform(0.7, 1.0)))
    width, height = (max(size, round(side * scale)) for side in source.size)
    left, top = (int(random.integers(room + 1)) for room in (width - size, height - size))
    resized = source.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)))


def encoded(array: NDArray[np.uint8], source: Source) -> bytes:
    """A picture as JPEG of quality 95 or as PNG."""
    buffer = io.BytesIO()
    if source == "jpeg":
        Image.fromarray(array).save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, count: int, size: int, source: Source) -> list[Path]:
    """``count`` picture files."""
    folder.mkdir(parents=True)
    suffix = "jpg" if source == "jpeg" else "png"
    paths = [folder / f"{number:06d}.{suffix}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(picture(number, size), source))
    return paths


@cache
def _sources() -> list[Image.Image]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    missing = [name for name in NAMES if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} has no {', '.join(missing)}.", "Install scikit-image anew.")
    return [Image.open(folder / name).convert("RGB") for name in NAMES]
