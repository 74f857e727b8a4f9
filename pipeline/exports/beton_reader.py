"""Read ``.beton`` files: by number for training, through ffcv's own loader to check what was written."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from iqpir.errors import VerificationError
from pipeline.exports.beton import FIELDS, Mode, Picture, require_ffcv


class BetonReader:
    """Pictures of a ``.beton`` by number, through ffcv's own reader of the format and a memory map.

    Raises:
        UsageError: ffcv is missing.
        VerificationError: the file is no ``.beton`` with the fields of this project.
    """

    def __init__(self, path: Path) -> None:
        require_ffcv()
        from ffcv.fields.rgb_image import IMAGE_MODES
        from ffcv.reader import Reader

        damaged = VerificationError(f"{path} is no .beton of this project.", "Export the view again.")
        try:
            reader = Reader(str(path))
        except (AssertionError, ValueError, IndexError, KeyError) as error:
            raise damaged from error
        if tuple(reader.field_names) != FIELDS:
            raise damaged
        columns = [reader.metadata[name] for name in reader.metadata.dtype.names]
        self.pictures = columns[0]
        self.quality: NDArray[np.float64] = columns[1].reshape(-1)
        self.index: NDArray[np.int64] = columns[2].reshape(-1)
        self._raw = int(IMAGE_MODES["raw"])
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        order = np.argsort(reader.alloc_table["ptr"], kind="stable")
        self._starts = reader.alloc_table["ptr"][order]
        self._sizes = reader.alloc_table["size"][order]

    def __len__(self) -> int:
        return len(self.quality)

    def picture(self, index: int) -> Picture:
        """Picture number ``index``, uint8 RGB HWC, a copy."""
        facts = self.pictures[index]
        start, height, width = int(facts["data_ptr"]), int(facts["height"]), int(facts["width"])
        if int(facts["mode"]) == self._raw:
            return np.array(self._bytes[start : start + 3 * height * width]).reshape(height, width, 3)
        size = int(self._sizes[np.searchsorted(self._starts, start)])
        decoded = cv2.imdecode(np.array(self._bytes[start : start + size]), cv2.IMREAD_COLOR)
        if decoded is None:
            raise VerificationError(f"Sample {index} of the .beton holds no JPEG.", "Export the view again.")
        return np.ascontiguousarray(decoded[:, :, ::-1]).astype(np.uint8, copy=False)


def load_pictures(path: Path, indices: list[int]) -> list[Picture]:
    """Pictures as ffcv's compiled ``Loader`` gives them: the path that a foreign training would use."""
    require_ffcv()
    from ffcv.fields.decoders import FloatDecoder, IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    decoders = ([SimpleRGBImageDecoder()], [FloatDecoder()], [IntDecoder()])
    loader = Loader(
        str(path),
        batch_size=len(indices),
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        indices=np.array(indices),
        drop_last=False,
        pipelines=dict(zip(FIELDS, decoders, strict=True)),
    )
    found: dict[int, Picture] = {}
    for pictures, _, numbers in loader:
        pairs = zip(np.array(pictures), numbers.reshape(-1), strict=True)
        found |= {int(number): picture for picture, number in pairs}
    return [found[index] for index in indices]


def read_back(path: Path, quality: NDArray[np.float64], expected: dict[int, Picture], mode: Mode) -> None:
    """Compare a written ``.beton`` with what should be in it.

    Args:
        path: the file.
        quality: of every sample, in order.
        expected: some pictures by number; equal in every pixel for ``raw``, close for ``jpg``.
        mode: as written.

    Raises:
        VerificationError: something differs.
    """
    reader = BetonReader(path)
    if len(reader) != len(quality) or not np.array_equal(reader.index, np.arange(len(quality))):
        raise VerificationError(f"The .beton holds {len(reader)} samples in place of {len(quality)}.")
    if not np.array_equal(reader.quality, quality):
        raise VerificationError("The qualities in the .beton differ from the view's.")
    loaded = load_pictures(path, list(expected))
    for (index, picture), found in zip(expected.items(), loaded, strict=True):
        if found.shape != picture.shape:
            raise VerificationError(f"Picture {index} of the .beton has shape {found.shape}.")
        if mode == "raw" and not (np.array_equal(found, picture) and np.array_equal(reader.picture(index), picture)):
            raise VerificationError(f"Picture {index} of the .beton differs from the view's.")
        if mode == "jpg" and not _close(found, picture):
            raise VerificationError(f"Picture {index} of the .beton does not resemble the view's.")


def _close(found: Picture, picture: Picture) -> bool:
    """Whether JPEG is a plausible cause of the difference: the means of the channels agree."""
    difference = found.mean(axis=(0, 1)) - picture.mean(axis=(0, 1))
    return bool(np.abs(difference).max() < 6.0)
