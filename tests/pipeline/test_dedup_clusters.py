"""All near pairs are found, and clusters are what joining them one by one gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.duplicates import clusters
from pipeline.duplicates.clusters import Forest, distances, join_equal, near_pairs


def _hashes(seed: int, groups: int, copies: int, flips: int) -> np.ndarray:
    """``groups`` random hashes, each ``copies`` times with up to ``flips`` bits changed."""
    random = np.random.default_rng(seed)
    found = []
    for value in random.integers(0, 1 << 63, groups, dtype=np.uint64):
        for _ in range(copies):
            bits = random.choice(64, random.integers(0, flips + 1), replace=False)
            found.append(int(value) ^ sum(1 << int(bit) for bit in bits))
    return np.array(found, np.uint64)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, 6), st.integers(0, 12), st.integers(0, 9), st.data())
def test_banded_search_finds_exactly_the_pairs_within_the_radius(
    seed: int, groups: int, copies: int, flips: int, radius: int, data: st.DataObject
) -> None:
    hashes = _hashes(seed, groups, copies, flips)
    bands = data.draw(st.sampled_from([0, 3, 4, radius + 1]))
    pieces = data.draw(st.sampled_from([1, 7, 1 << 20]))
    if radius // (bands or 1) > 3:
        bands = 0  # many flips of long bands: right, and slow
    found = {
        pair
        for first, second in near_pairs(hashes, radius, bands, pieces)
        for pair in zip(first.tolist(), second.tolist(), strict=True)
    }
    wanted = {
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= radius
    }
    assert found == wanted


def test_no_piece_of_candidates_is_larger_than_asked_although_all_hashes_are_equal() -> None:
    pieces = [len(first) for first, _ in near_pairs(np.zeros(300, np.uint64), 2, pieces=1000)]
    assert max(pieces) <= 1000
    assert sum(pieces) >= 300 * 299 / 2


def test_ten_thousand_hashes_need_few_comparisons() -> None:
    """The search is not quadratic: pairs that are handed out per band stay far below N * N / 2."""
    hashes = np.random.default_rng(5).integers(0, 1 << 63, 10_000, dtype=np.uint64)
    seen = sum(len(a) for a, _ in clusters._candidates(np.sort(hashes >> np.uint64(51)), 13, 1, 1 << 20))
    assert 0 < seen < 10_000 * 10_000 / 2 / 200


def test_distance_counts_bits() -> None:
    first = np.array([0, 0b1011, (1 << 64) - 1], np.uint64)
    assert distances(first, np.zeros(3, np.uint64)).tolist() == [0, 3, 64]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40), st.booleans())
def test_a_root_is_the_smallest_row_of_its_set(count: int, pairs: list[tuple[int, int]], together: bool) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    forest = Forest(count)
    if together and pairs:
        forest.join(*np.array(pairs, np.int64).T)
    else:
        for a, b in pairs:
            forest.join(np.array([a]), np.array([b]))
    labels = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            labels[a] = labels[b] = min(labels[a], labels[b])
    assert forest.roots().tolist() == labels


def test_equal_values_join_and_empty_ones_do_not() -> None:
    forest = Forest(5)
    leaders = join_equal(forest, np.array([b"x", b"", b"x", b"", b"y"]))
    assert leaders.tolist() == forest.roots().tolist() == [0, 1, 0, 3, 4]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_have_no_pairs(count: int) -> None:
    assert list(near_pairs(np.zeros(count, np.uint64), 6)) == []
