"""Feed training: from a view's rows to batches, in an order that one integer resumes exactly.

The order, the flips, the crops and the degradations are functions of (seed, epoch, index), so the same
sample gets the same treatment on any worker of any world size, and ``samples_seen`` is the whole state.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from iqpir.config import NetworkConfig
from iqpir.degradation.parameters import DegradationConfig, sample_parameters
from iqpir.degradation.picture import degrade
from iqpir.errors import UsageError
from iqpir.pixels import PixelPolicy, decode
from iqpir.stages.batch import Batch
from iqpir.training.order import ShardBlockOrder, position_of, rank_slice, sample_at
from pipeline.corpus import Corpus
from pipeline.training.pairs import Pairs
from pipeline.training.scores import condition
from pipeline.training.shard_cache import ShardCache

Picture = NDArray[np.uint8]
Fit = Literal["exact", "resize", "crop"]
_AUGMENT = 0x666C6970
"""Key of the random stream that decides flips and crops, apart from the degradation's."""


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How samples reach the training loop."""

    kind: Literal["indexed", "ffcv"] = "indexed"
    """``indexed`` reads the corpus's tars by offset; ``ffcv`` a node-local ``.beton`` that jobs/export.py made."""
    beton: str = ""
    """Path of the ``.beton``, for ``ffcv``."""
    workers: int = 0
    """Loader processes of each training worker; 0 loads in the training process."""
    cache: str = ""
    """Folder for whole shards of a remote corpus, one copy a node; a folder of the system's by default."""
    cache_gib: float = 0.0
    """Size of these copies at most, those that were not used for longest go first; 0: half of the disk."""
    shards_per_block: int = 0
    """Mix samples of so many shards at a time, for corpora that are larger than the cache; 0: of the whole view."""
    fit: Fit = "exact"
    """How a sample becomes ``image_size``: must be it already; centre square, resized; random crop."""
    flip: bool = True
    """Mirror half of the samples."""
    pixels: PixelPolicy = field(default_factory=PixelPolicy)
    """How bytes become pixels."""

    def __post_init__(self) -> None:
        if self.kind == "ffcv" and not self.beton:
            raise UsageError("feed.kind is ffcv and feed.beton is empty.", "Run jobs/export.py --format ffcv.")
        if self.workers < 0 or self.cache_gib < 0 or self.shards_per_block < 0:
            raise UsageError(
                f"feed.workers {self.workers}, feed.cache_gib {self.cache_gib}, feed.shards_per_block "
                f"{self.shards_per_block}: none may be negative."
            )


def fit_picture(picture: Picture, size: int, fit: Fit, random: np.random.Generator | None = None) -> Picture:
    """Bring a picture to ``size`` x ``size``.

    Args:
        picture: uint8 RGB HWC.
        size: side in pixels.
        fit: ``exact`` | ``resize`` | ``crop``.
        random: places the crop of ``crop``; the centre without it.

    Raises:
        UsageError: ``exact`` and the sides differ; ``crop`` and a side is too short.
    """
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    if fit == "exact":
        raise UsageError(
            f"A sample is {width}x{height}, the network wants {size}x{size}.",
            "Shard with --crop.size, curate by width and height, or set feed.fit to resize or crop.",
        )
    if fit == "crop":
        if min(height, width) < size:
            raise UsageError(
                f"A sample is {width}x{height}: too small for a crop of {size}.",
                f"Curate with --where 'least(width, height) >= {size}'.",
            )
        room = (height - size, width - size)
        top, left = (
            (room[0] // 2, room[1] // 2)
            if random is None
            else (int(random.integers(room[0] + 1)), int(random.integers(room[1] + 1)))
        )
        return np.ascontiguousarray(picture[top : top + size, left : left + size])
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side]
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(square, (size, size), interpolation=method), dtype=np.uint8)


@dataclass(frozen=True)
class Item:
    """One training sample before batching; pictures are uint8 RGB HWC."""

    hq: Picture
    lq: Picture | None
    condition: NDArray[np.float32]
    """The quality, of no axis, or [n] scores."""
    index: int
    flipped: bool
    codes: NDArray[np.int16] | None


class Samples(Dataset[Item]):
    """Training samples by position in the endless, shuffled sequence; reads tars by offset.

    Args:
        corpus_url: the corpus; opened anew in each process.
        rows: the view's rows of one split.
        network: gives ``image_size``.
        degradation: how LQ is made from HQ; None: no LQ (stage 1).
        codes: int16 ``[N, 2, C, h, w]``, original and mirrored, a row each sample; or None.
        seed: of order, flips, crops and degradations.
        schedule: position -> degradation, where it changes during a training; picklable.
        pairs: LQ that exist, a row each sample; then nothing is degraded.
        scores: metrics whose calibrated scores are the condition, in place of the quality.
    """

    def __init__(
        self,
        corpus_url: str,
        rows: pa.Table,
        config: FeedConfig,
        network: NetworkConfig,
        degradation: DegradationConfig | None,
        codes: NDArray[np.int16] | None,
        seed: int,
        schedule: Callable[[int], DegradationConfig] | None = None,
        pairs: Pairs | None = None,
        scores: Sequence[str] = (),
    ) -> None:
        self.schedule, self.pairs = schedule, pairs
        self.corpus_url, self.config, self.size = corpus_url, config, network.image_size
        self.degradation, self.codes, self.seed = degradation, codes, seed
        self.shards = rows["shard"].dictionary_encode().combine_chunks()
        self.offsets = rows["byte_offset"].to_numpy()
        self.sizes = rows["byte_size"].to_numpy()
        self.quality = rows["quality"].to_numpy().astype(np.float32)
        self.condition = condition(rows, scores)
        self.cache: ShardCache | None = None
        codes_of_shards = self.shards.indices.to_numpy()
        self.by_shard = np.argsort(codes_of_shards, kind="stable")
        self.blocks = None
        if config.shards_per_block:
            sizes = np.bincount(codes_of_shards, minlength=len(self.shards.dictionary)).tolist()
            self.blocks = ShardBlockOrder(shard_sizes=sizes, seed=seed, shards_per_block=config.shards_per_block)

    def __len__(self) -> int:
        return len(self.offsets)

    def hq(self, index: int) -> Picture:
        """The sample's whole picture, decoded."""
        if self.cache is None:
            self.cache = ShardCache(Corpus(self.corpus_url), self.config.cache, self.config.cache_gib)
        shard = self.shards[index].as_py()
        data = self.cache.read(shard, int(self.offsets[index]), int(self.sizes[index]))
        return decode(data, self.config.pixels).array

    def __getitem__(self, position: int) -> Item:
        epoch, index = self.at(position)
        degradation = self.degradation if self.schedule is None else self.schedule(position)
        return self.prepare(self.hq(index), epoch, index, degradation)

    def at(self, position: int) -> tuple[int, int]:
        """The (epoch, sample) at ``position`` of the sequence."""
        if self.blocks is None:
            return sample_at(position, len(self), self.seed)
        epoch, number = self.blocks.at(position)
        return epoch, int(self.by_shard[number])

    def position(self, epoch: int, index: int) -> int:
        """Inverse of ``at``."""
        if self.blocks is None:
            return position_of(epoch, index, len(self), self.seed)
        places = range(epoch * len(self), (epoch + 1) * len(self))
        return next(place for place in places if self.at(place)[1] == index)

    def prepare(self, picture: Picture, epoch: int, index: int, degradation: DegradationConfig | None) -> Item:
        """Fit, mirror and degrade one picture, as (seed, epoch, index) decide."""
        hq, flipped = self._augmented(picture, epoch, index)
        lq = None
        if self.pairs is not None:
            lq = self._augmented(self.pairs.lq(index), epoch, index)[0]
        elif degradation is not None:
            lq = degrade(hq, sample_parameters(degradation, self.seed, epoch, index))
        codes = None if self.codes is None else self.codes[index, int(flipped)]
        return Item(hq, lq, np.asarray(self.condition[index]), index, flipped, codes)

    def _augmented(self, picture: Picture, epoch: int, index: int) -> tuple[Picture, bool]:
        """The picture fitted and perhaps mirrored, and whether it is; alike for both pictures of a pair."""
        random = np.random.Generator(np.random.Philox(key=[self.seed ^ _AUGMENT, (epoch << 40) | index]))
        flipped = bool(random.integers(2)) and self.config.flip
        fitted = fit_picture(picture, self.size, self.config.fit, random)
        return (np.ascontiguousarray(fitted[:, ::-1]) if flipped else fitted), flipped


class Positions(Sampler[int]):
    """Positions of this rank from ``samples_seen`` on: its slice of each global batch, for ever."""

    def __init__(self, samples_seen: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start, self.batch_size, self.rank, self.world_size = samples_seen, batch_size, rank, world_size

    def __iter__(self) -> Iterator[int]:
        slots = range(self.batch_size)[rank_slice(self.batch_size, self.rank, self.world_size)]
        start = self.start
        while True:
            yield from (start + slot for slot in slots)
            start += self.batch_size


@dataclass(frozen=True)
class IndexedFeed:
    """Batches of a view's training split, read from the corpus itself (a ``BatchSource``).

    Attributes:
        batch_size: samples of one global batch; each rank takes ``batch_size / world_size``.
    """

    samples: Samples
    batch_size: int
    rank: int
    world_size: int
    device: torch.device

    def __post_init__(self) -> None:
        rank_slice(self.batch_size, self.rank, self.world_size)  # refuses what cannot be shared

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """This rank's part of each global batch, from sample number ``samples_seen`` on."""
        workers = self.samples.config.workers
        loader = DataLoader(
            self.samples,
            batch_size=self.batch_size // self.world_size,
            sampler=Positions(samples_seen, self.batch_size, self.rank, self.world_size),
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context=multiprocessing.get_context("forkserver") if workers else None,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield batch.to(self.device)


def collate(items: list[Item]) -> Batch:
    """Stack items: pictures to float [B,3,R,R] in [-1,1], conditions to float32 [B] or [B,n]."""
    lq = [item.lq for item in items if item.lq is not None]
    codes = [item.codes for item in items if item.codes is not None]
    return Batch(
        hq=pictures_to_tensor([item.hq for item in items]),
        lq=pictures_to_tensor(lq) if lq else None,
        quality=torch.from_numpy(np.stack([item.condition for item in items])),
        codes=torch.from_numpy(np.stack(codes).astype(np.int64)) if codes else None,
        index=torch.tensor([item.index for item in items], dtype=torch.int64),
        flipped=torch.tensor([item.flipped for item in items], dtype=torch.bool),
    )


def pictures_to_tensor(pictures: list[Picture]) -> torch.Tensor:
    """uint8 RGB HWC pictures of one size to float32 [B,3,H,W] in [-1,1]."""
    height, width = pictures[0].shape[:2]
    # Filled in place: each further copy of a batch costs as much as decoding it, most of it for new pages.
    stacked = torch.empty(len(pictures), 3, height, width)
    for picture, place in zip(pictures, stacked, strict=True):
        planes = torch.from_numpy(picture).permute(2, 0, 1)
        if planes.is_contiguous():
            place.copy_(planes)
            continue
        for channel, plane in zip(cv2.split(picture), place, strict=True):
            plane.copy_(torch.from_numpy(channel))
    return stacked.div_(127.5).sub_(1.0)
