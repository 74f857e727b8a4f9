"""Join near-duplicates to clusters: all pairs of 64-bit hashes within a radius, and a union-find over rows.

Pairs are found by multi-index hashing: cut both hashes into m bands, and two hashes that differ in r bits agree
in some band up to ``r // m`` bits (Norouzi et al., "Fast Search in Hamming Space with Multi-Index Hashing",
CVPR 2012). Candidates are made and thrown away in pieces, so memory grows with rows and never with pairs.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]

HASH_BITS = 64
PAIRS = 1 << 20
"""Most candidate pairs that are looked at together."""

_POPCOUNT = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


class Forest:
    """A union-find over rows 0..count-1; the root of a set is its smallest row."""

    def __init__(self, count: int) -> None:
        self._parent: Rows = np.arange(count, dtype=np.int64)

    def join(self, first: Rows, second: Rows) -> None:
        """Join the sets of ``first[i]`` and ``second[i]`` for each i; rows may repeat."""
        roots = self.roots()
        first, second = roots[first], roots[second]
        different = first != second
        for a, b in zip(first[different].tolist(), second[different].tolist(), strict=True):
            low, high = sorted((self._root(a), self._root(b)))
            self._parent[high] = low

    def together(self, first: Rows, second: Rows) -> NDArray[np.bool_]:
        """Whether ``first[i]`` and ``second[i]`` are in one set already."""
        roots = self.roots()
        return np.asarray(roots[first] == roots[second])

    def roots(self) -> Rows:
        """The root of each row; do not change the array."""
        while True:
            shorter = self._parent[self._parent]
            if np.array_equal(shorter, self._parent):
                return self._parent
            self._parent = shorter

    def _root(self, row: int) -> int:
        while (parent := int(self._parent[row])) != row:
            row = parent
        return row


def join_equal(forest: Forest, values: NDArray[np.bytes_]) -> Rows:
    """Join rows with equal values; an empty value equals nothing.

    Returns:
        the first row with the value of each row [N]; a row without value has itself.
    """
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rows = np.arange(len(values), dtype=np.int64)
    leaders = np.where(values == b"", rows, first[inverse].astype(np.int64))
    forest.join(leaders, rows)
    return leaders


def near_pairs(hashes: Hashes, radius: int, bands: int = 0, pieces: int = PAIRS) -> Iterator[tuple[Rows, Rows]]:
    """Every pair of rows whose hashes differ in at most ``radius`` bits, in pieces; a pair may come twice.

    Args:
        hashes: uint64 [N].
        radius: 0 to 63.
        bands: into how many parts hashes are cut; 0: into as many as cost least.
        pieces: most candidates that are looked at together.

    Yields:
        two arrays of rows, the smaller first.
    """
    if len(hashes) < 2:
        return
    count = bands or min(range(1, radius + 2), key=lambda number: _cost(len(hashes), radius, number))
    edges = np.linspace(0, HASH_BITS, count + 1).round().astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        values = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(values, kind="stable").astype(np.int64)
        for first, second in _candidates(values[order], high - low, radius // count, pieces):
            a, b = order[first], order[second]
            close = (a != b) & (distances(hashes[a], hashes[b]) <= radius)
            if close.any():
                yield np.minimum(a, b)[close], np.maximum(a, b)[close]


def distances(first: Hashes, second: Hashes) -> NDArray[np.uint8]:
    """Bits in which ``first[i]`` and ``second[i]`` differ."""
    parts = (first ^ second).view(np.uint16).reshape(-1, 4)
    return np.asarray(_POPCOUNT[parts].sum(axis=1, dtype=np.uint8))


def _cost(count: int, radius: int, bands: int) -> float:
    """Work of a search: each way to flip bits of a band looks every value up and compares what it finds."""
    width = HASH_BITS / bands
    ways = sum(math.comb(math.ceil(width), flipped) for flipped in range(radius // bands + 1))
    return bands * ways * (count + 0.25 * count**2 / 2**width)


def _candidates(values: Hashes, width: int, radius: int, pieces: int) -> Iterator[tuple[Rows, Rows]]:
    """Positions in sorted ``values`` [N] that differ in at most ``radius`` of ``width`` bits, in pieces."""
    distinct, starts, counts = np.unique(values, return_index=True, return_counts=True)
    yield from _products(starts, counts, starts, counts, pieces)
    for flipped in range(1, radius + 1):
        for bits in itertools.combinations(range(width), flipped):
            wanted = distinct ^ np.uint64(sum(1 << bit for bit in bits))
            place = np.minimum(np.searchsorted(distinct, wanted), len(distinct) - 1)
            # Each pair of buckets is met from both sides; the smaller value takes it.
            found = (distinct[place] == wanted) & (distinct < wanted)
            other = place[found]
            yield from _products(starts[found], counts[found], starts[other], counts[other], pieces)


def _products(
    first: NDArray[np.intp],
    first_counts: NDArray[np.intp],
    second: NDArray[np.intp],
    second_counts: NDArray[np.intp],
    pieces: int,
) -> Iterator[tuple[Rows, Rows]]:
    """Every position of bucket ``first[i]`` with every one of bucket ``second[i]``, ``pieces`` at a time."""
    same = first is second
    sizes = first_counts.astype(np.int64) * second_counts
    keep = sizes > 1 if same else sizes > 0
    first, second, widths, sizes = first[keep], second[keep], second_counts[keep], sizes[keep]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, pieces):
        stop = min(start + pieces, total)
        low, high = (int(np.searchsorted(ends, number, side="right")) for number in (start, stop - 1))
        met = slice(low, high + 1)
        share = np.minimum(ends[met], stop) - np.maximum(ends[met] - sizes[met], start)
        bucket = np.repeat(np.arange(low, high + 1), share)
        numbers = np.arange(start, stop, dtype=np.int64)
        inside = numbers - (ends[bucket] - sizes[bucket])
        a, b = first[bucket] + inside // widths[bucket], second[bucket] + inside % widths[bucket]
        once = a < b if same else np.ones(len(a), np.bool_)
        yield a[once].astype(np.int64), b[once].astype(np.int64)
