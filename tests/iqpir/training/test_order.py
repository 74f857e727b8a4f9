"""The sample order: each sample once an epoch, a function of (seed, position), for any number of ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iqpir.errors import UsageError
from iqpir.training.order import ShardBlockOrder, permute, position_of, rank_slice, sample_at

counts = st.integers(1, 3000)
seeds = st.integers(0, 2**63)


@settings(max_examples=30, deadline=None)
@given(counts, seeds)
def test_a_permutation_hits_every_place_once(count: int, key: int) -> None:
    assert sorted(permute(place, count, key) for place in range(count)) == list(range(count))


@settings(max_examples=20, deadline=None)
@given(counts, seeds, st.integers(0, 50))
def test_each_epoch_has_each_sample_once(count: int, seed: int, epoch: int) -> None:
    seen = [sample_at(epoch * count + place, count, seed) for place in range(count)]
    assert {number for number, _ in seen} == {epoch}
    assert sorted(index for _, index in seen) == list(range(count))
    found = [position_of(number, index, count, seed) for number, index in seen]
    assert found == [epoch * count + place for place in range(count)]


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(sample_at(epoch * 100 + place, 100, seed)[1] for place in range(100))
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_fixed_for_ever() -> None:
    # Resuming an old checkpoint depends on these very numbers.
    assert [sample_at(position, 10, 2603) for position in (0, 1, 9, 10, 12345)] == PINNED


def test_positions_far_out_in_huge_views_cost_nothing() -> None:
    epoch, index = sample_at(10**15 + 7, 10**12 + 3, 1)
    assert epoch == (10**15 + 7) // (10**12 + 3)
    assert 0 <= index < 10**12 + 3


def test_places_are_spread_evenly() -> None:
    # The mean of 1000 of 10000 places has a deviation of 0.0087 of the range.
    first_tenth = [permute(place, 10_000, 42) for place in range(1000)]
    assert abs(sum(first_tenth) / 1000 / 10_000 - 0.5) < 0.04
    neighbours = sum(abs(permute(place, 10_000, 42) - permute(place + 1, 10_000, 42)) == 1 for place in range(9_999))
    assert neighbours < 20


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000), seeds)
def test_ranks_together_see_what_one_process_sees(world: int, each: int, start: int, seed: int) -> None:
    batch = world * each
    alone = [sample_at(start + slot, 97, seed) for slot in range(batch)]
    together = [
        sample_at(start + slot, 97, seed)
        for rank in range(world)
        for slot in range(batch)[rank_slice(batch, rank, world)]
    ]
    assert together == alone


@pytest.mark.parametrize(("batch", "world"), [(10, 3), (2, 4), (0, 1), (4, 0)])
def test_a_batch_that_ranks_cannot_share_is_refused(batch: int, world: int) -> None:
    with pytest.raises(UsageError, match="global batch"):
        rank_slice(batch, 0, world)


def test_an_empty_view_is_refused() -> None:
    with pytest.raises(UsageError, match="no samples"):
        sample_at(0, 0, 1)
    with pytest.raises(UsageError, match="no samples"):
        ShardBlockOrder(shard_sizes=[0, 0], seed=1)


shards = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=40, deadline=None)
@given(shards, st.integers(1, 8), seeds)
def test_block_order_has_each_sample_once_an_epoch(sizes: list[int], block: int, seed: int) -> None:
    order = ShardBlockOrder(shard_sizes=sizes, seed=seed, shards_per_block=block)
    for epoch in (0, 3):
        seen = [order.at(epoch * order.count + place) for place in range(order.count)]
        assert {number for number, _ in seen} == {epoch}
        assert sorted(index for _, index in seen) == list(range(order.count))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), seeds)
def test_block_order_needs_few_shards_at_a_time(number: int, block: int, seed: int) -> None:
    order = ShardBlockOrder(shard_sizes=[10] * number, seed=seed, shards_per_block=block)
    window = 10 * block
    for begin in range(0, order.count, window):
        end = min(begin + window, order.count)
        assert len({order.at(place)[1] // 10 for place in range(begin, end)}) == min(block, (end - begin) // 10)


def test_block_order_can_be_entered_anywhere() -> None:
    forward = ShardBlockOrder(shard_sizes=[5, 0, 7, 3, 9], seed=4, shards_per_block=2)
    expected = [forward.at(position) for position in range(60)]
    for position in (59, 3, 24, 30, 0):
        assert (
            ShardBlockOrder(shard_sizes=[5, 0, 7, 3, 9], seed=4, shards_per_block=2).at(position) == expected[position]
        )


PINNED = [(0, 1), (0, 7), (0, 5), (1, 0), (1234, 7)]
