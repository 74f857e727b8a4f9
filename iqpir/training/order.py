"""The order in which samples are seen: a function of (seed, position), not of a process.

Position ``p`` counts samples since the start of training. Its epoch is ``p // count`` and its place
in the epoch is put through a keyed permutation, a Feistel network with cycle walking, so one
integer, ``samples_seen``, resumes training exactly with any number of ranks.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from iqpir.errors import UsageError

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(value: int) -> int:
    """64-bit finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key from several integers; order matters."""
    key = 0
    for part in parts:
        key = mix(key ^ (part & _MASK))
    return key


def permute(place: int, count: int, key: int) -> int:
    """Where ``place`` goes in the permutation of ``range(count)`` that belongs to ``key``.

    A Feistel network permutes the smallest even-bit domain that holds ``count``; places that fall
    outside are put through it again until they fall inside (fewer than 4 times on average).
    Constant time and memory.

    Args:
        place: in [0, count).
        count: size of the domain, at least 1.
        key: 64 bits, see ``derive_key``.
    """
    if not 0 <= place < count:
        raise IndexError(f"place {place} is outside range({count})")
    half = _half(count)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(key ^ mix((right << 8) | turn)) & mask)
        place = (left << half) | right
        if place < count:
            return place


def place_of(permuted: int, count: int, key: int) -> int:
    """Inverse of ``permute``: the place that goes to ``permuted``."""
    if not 0 <= permuted < count:
        raise IndexError(f"place {permuted} is outside range({count})")
    half = _half(count)
    mask = (1 << half) - 1
    while True:
        left, right = permuted >> half, permuted & mask
        for turn in reversed(range(_ROUNDS)):
            left, right = right ^ (mix(key ^ mix((left << 8) | turn)) & mask), left
        permuted = (left << half) | right
        if permuted < count:
            return permuted


def _half(count: int) -> int:
    """Bits of each half of the network's words: two halves hold ``count`` places."""
    return max(1, ((count - 1).bit_length() + 1) // 2)


def sample_at(position: int, count: int, seed: int) -> tuple[int, int]:
    """The (epoch, sample number) at ``position`` of training.

    Args:
        position: samples seen before this one, from 0, over all ranks.
        count: samples in the view.
        seed: of the training.

    Raises:
        UsageError: an empty view.
    """
    if count < 1:
        raise UsageError("The view has no samples.", "Loosen its condition or choose another split.")
    epoch, place = divmod(position, count)
    return epoch, permute(place, count, derive_key(seed, epoch))


def position_of(epoch: int, index: int, count: int, seed: int) -> int:
    """Inverse of ``sample_at``: the position at which sample ``index`` is seen in ``epoch``."""
    return epoch * count + place_of(index, count, derive_key(seed, epoch))


def rank_slice(global_batch: int, rank: int, world_size: int) -> slice:
    """The slots of each global batch that ``rank`` takes; slots of all ranks are disjoint and cover it.

    Raises:
        UsageError: the global batch cannot be divided evenly.
    """
    if world_size < 1 or global_batch < world_size or global_batch % world_size:
        raise UsageError(
            f"A global batch of {global_batch} cannot be shared evenly by {world_size} ranks.",
            "Choose a global batch that is a multiple of the number of ranks.",
        )
    size = global_batch // world_size
    return slice(rank * size, (rank + 1) * size)


@dataclass(kw_only=True)
class ShardBlockOrder:
    """Two-level order for local reads: shards are permuted, and samples inside blocks of shards.

    While one block is read only ``shards_per_block`` shards need to be at hand. Samples are
    numbered shard by shard. O(log shards) per position after O(shards) once an epoch.
    """

    shard_sizes: Sequence[int]
    """Samples in each shard, in the order of the sample numbers."""
    seed: int
    """Seed of the training."""
    shards_per_block: int = 16
    """Shards whose samples are mixed with each other."""
    _epoch: int = field(default=-1, init=False)
    _shards: list[int] = field(default_factory=list, init=False)
    _ends: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.shards_per_block < 1:
            raise UsageError(f"shards_per_block {self.shards_per_block} must be at least 1.")
        self.count = sum(self.shard_sizes)
        self._starts = [0, *itertools.accumulate(self.shard_sizes)]
        if self.count < 1:
            raise UsageError("The view has no samples.", "Loosen its condition or choose another split.")

    def at(self, position: int) -> tuple[int, int]:
        """The (epoch, sample number) at ``position``; see ``sample_at``."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._enter(epoch)
        first = bisect.bisect_right(self._ends, place) // self.shards_per_block * self.shards_per_block
        last = min(first + self.shards_per_block, len(self._shards)) - 1
        begin = self._ends[first - 1] if first else 0
        size = self._ends[last] - begin
        inside = begin + permute(place - begin, size, derive_key(self.seed, epoch, 1 + first))
        slot = bisect.bisect_right(self._ends, inside)
        shard = self._shards[slot]
        offset = inside - (self._ends[slot - 1] if slot else 0)
        return epoch, self._starts[shard] + offset

    def _enter(self, epoch: int) -> None:
        shards = len(self.shard_sizes)
        key = derive_key(self.seed, epoch, 0)
        self._shards = [permute(place, shards, key) for place in range(shards)]
        self._ends = list(itertools.accumulate(self.shard_sizes[shard] for shard in self._shards))
        self._epoch = epoch
