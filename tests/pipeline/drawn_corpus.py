"""A small sealed corpus of pictures with ordered quality, made by the real shard job."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.corpus import Corpus
from pipeline.metrics.distortions import distort
from pipeline.shard import ShardConfig, shard

STRENGTHS = (-1.0, 0.2, 0.5, 0.9)
"""Below 0: as drawn."""


def drawn_picture(seed: int, side: int = 48) -> NDArray[np.uint8]:
    """Edges, shades and fine texture: uint8 RGB [side,side,3], a function of ``seed``."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side]
    wave = np.sin(x / random.uniform(2, 5)) * np.sin(y / random.uniform(2, 5))
    picture = 128 + 60 * np.sign(wave)[..., None] + random.uniform(-40, 40, 3)
    picture = picture + 20 * np.sin(x * y / 90.0)[..., None] + random.normal(0, 3, (side, side, 3))
    return picture.clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int, side: int = 48) -> Path:
    """``count`` drawn pictures, each at four strengths of blur or noise: ``07-2.png`` is picture 7, third."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        for level, strength in enumerate(STRENGTHS):
            picture = drawn_picture(number, side)
            if strength >= 0:
                picture = distort(picture, "blur" if number % 2 else "noise", strength, number)
            Image.fromarray(picture).save(folder / f"{number:02d}-{level}.png")
    return folder


def drawn_corpus(folder: Path, count: int = 4, side: int = 48, unit_samples: int = 6) -> Corpus:
    """A sealed corpus of ``4 * count`` pictures in several units."""
    source = write_pictures(folder / "pictures", count, side)
    url = str(folder / "corpus")
    shard(ShardConfig(input=str(source), corpus=url, unit_samples=unit_samples, workers=0))
    return Corpus(url)
