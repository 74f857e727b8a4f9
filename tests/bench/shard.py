"""The usual way to make tars of pictures that are known to be whole: decode with Pillow, webdataset's writer."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def write(paths: Sequence[Path], folder: Path, maxsize: int) -> None:
    """Tars of at most about ``maxsize`` bytes: the picture's bytes and a JSON with what a row of ours says."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxsize=maxsize, verbose=0) as writer:
        for path in paths:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image.convert("RGB"))
            facts = {
                "relpath": path.name,
                "width": pixels.shape[1],
                "height": pixels.shape[0],
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            writer.write({"__key__": path.stem, path.suffix[1:]: data, "json": facts})
