from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_tuner.data import order
from ltx2_tuner.data.inventory import CachedItem


def items(keys) -> list[CachedItem]:
    none = Path("x")
    return [
        CachedItem(f"{n}", f"{n}", none, none, None, None, None, None, 1, (1, 1), (4, 1, 1, 1), None, (key,))
        for n, key in enumerate(keys)
    ]


@given(
    keys=st.lists(st.integers(0, 3), min_size=1, max_size=25),
    batch_size=st.integers(1, 4),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_every_item_appears_as_often_as_asked_in_batches_of_one_bucket(keys, batch_size, repeats, seed, epoch):
    entries = items(keys)
    batches = order.epoch_batches(entries, batch_size, repeats, seed, epoch)
    counts = Counter(number for batch in batches for number in batch)
    assert counts == Counter(dict.fromkeys(range(len(keys)), repeats))
    assert all(len({keys[number] for number in batch}) == 1 and len(batch) <= batch_size for batch in batches)
    sizes = Counter(keys)
    assert len(batches) == sum(-(-count * repeats // batch_size) for count in sizes.values())
    assert batches == order.epoch_batches(entries, batch_size, repeats, seed, epoch)


def test_epoch_zero_is_sorted_and_later_ones_differ():
    entries = items([1, 0, 1, 0, 0])
    assert order.epoch_batches(entries, 2, 1, 7, 0) == [(1, 3), (4,), (0, 2)]
    epochs = [order.epoch_batches(items([0] * 20), 1, 1, 7, epoch) for epoch in range(4)]
    assert len({tuple(batches) for batches in epochs}) == 4


def test_the_documented_shuffle():
    """Epoch e: buckets in key order, then the batches, all from random.Random(seed + e)."""
    import random

    entries = items([1, 0, 1, 0, 0])
    generator = random.Random(7 + 2)
    low, high = [1, 3, 4], [0, 2]
    generator.shuffle(low)
    generator.shuffle(high)
    expected = [tuple(low[:2]), tuple(low[2:]), tuple(high)]
    generator.shuffle(expected)
    assert order.epoch_batches(entries, 2, 1, 7, 2) == expected


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=20), buckets=st.integers(2, 9), epoch=st.integers(0, 3))
def test_timesteps_are_stratified(sizes, buckets, epoch):
    pool = order.timestep_pool(sizes, buckets, 3, epoch)
    assert [len(draws) for draws in pool] == sizes
    values = [value for draws in pool for value in draws]
    assert all(0 <= value < 1 for value in values)
    counts = Counter(int(value * buckets) for value in values)
    assert max(counts.values()) <= -(-sum(sizes) // buckets)


def test_a_full_pool_has_equally_many_from_each_interval():
    values = [draw for draws in order.timestep_pool([2] * 10, 4, 0, 1) for draw in draws]
    assert Counter(int(value * 4) for value in values) == {0: 5, 1: 5, 2: 5, 3: 5}


@given(count=st.integers(0, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_the_global_order_is_a_permutation(count, seed, epoch):
    found = order.shuffled_order(count, seed, epoch)
    assert sorted(found) == list(range(count))
    assert found == order.shuffled_order(count, seed, epoch)


HEARD = st.lists(st.booleans(), min_size=1, max_size=40)


@given(heard=HEARD, window=st.integers(1, 6), quota=st.integers(1, 6), epoch=st.integers(1, 3))
def test_every_window_has_its_quota_of_sound(heard, window, quota, epoch):
    quota = min(quota, window)
    found = order.audio_quota_order(heard, window, quota, 5, epoch)
    assert sorted(found) == list(range(len(heard)))
    left = sum(heard)
    for start in range(0, len(found), window):
        part = found[start : start + window]
        audio = sum(heard[number] for number in part)
        assert audio >= min(quota, left, len(part))
        left -= audio


@given(heard=HEARD, probability=st.floats(0, 1), epoch=st.integers(1, 3))
def test_the_probability_order_is_a_permutation(heard, probability, epoch):
    found = order.audio_probability_order(heard, probability, 5, epoch)
    assert sorted(found) == list(range(len(heard)))


@pytest.mark.parametrize(("probability", "first"), [(1.0, True), (0.0, False)])
def test_extreme_probabilities(probability, first):
    heard = [True, False] * 10
    found = order.audio_probability_order(heard, probability, 5, 1)
    assert [heard[number] for number in found] == [first] * 10 + [not first] * 10


@given(count=st.integers(1, 30), world=st.integers(1, 5))
def test_ranks_share_the_order_evenly(count, world):
    shares = [order.rank_share(range(count), rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    merged = [number for step in zip(*shares) for number in step]
    assert merged[:count] == list(range(count))
