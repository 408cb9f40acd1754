from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkdeep.data.order import EpochOrder, batch_bounds, batch_range, num_batches
from sparkdeep.errors import ConfigError


@pytest.mark.parametrize(
    ("rows", "batch_size", "bounds"),
    [
        (0, 4, []),
        (1, 4, [[0, 1]]),
        (4, 4, [[0, 4]]),
        (5, 4, [[0, 5]]),
        (6, 4, [[0, 4], [4, 6]]),
        (9, 4, [[0, 4], [4, 9]]),
        (3, 1, [[0, 1], [1, 2], [2, 3]]),
        (3, 2, [[0, 3]]),
    ],
)
def test_a_lonely_last_row_joins_the_batch_before(rows, batch_size, bounds):
    got = batch_bounds(rows, batch_size)
    np.testing.assert_array_equal(got, np.array(bounds, np.int64).reshape(-1, 2), strict=True)


@given(st.integers(0, 200), st.integers(1, 50))
def test_batches_cover_every_row_once_and_agree_with_their_lazy_form(rows, batch_size):
    bounds = batch_bounds(rows, batch_size).tolist()
    assert bounds == [list(batch_range(rows, batch_size, i)) for i in range(num_batches(rows, batch_size))]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in bounds]
    assert all(size == batch_size for size in sizes[:-1])
    assert rows <= 1 or batch_size == 1 or 1 not in sizes


def test_huge_counts_cost_nothing():
    assert num_batches(10**15 + 1, 10) == 10**14
    assert batch_range(10**15 + 1, 10, 10**14 - 1) == (10**15 - 10, 10**15 + 1)


def test_impossible_batches_are_refused():
    with pytest.raises(ConfigError, match="batch_size=0: a batch needs at least one row"):
        num_batches(5, 0)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"batch {index} of an epoch of 2 batches"):
            batch_range(6, 4, index)


def order(rows, **changes):
    return EpochOrder(rows, **{"seed": 1, "epoch": 2, "digest": "d", **changes})


@settings(max_examples=200)
@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.integers(0, 3))
def test_every_row_comes_once_whatever_the_sizes(rows, block_rows, window_rows, step, epoch):
    one = order(rows, block_rows=block_rows, window_rows=window_rows, epoch=epoch)
    pieces = [one.indices(start, min(rows, start + step)) for start in range(0, rows, step)]
    got = np.concatenate([*pieces, np.zeros(0, np.int64)])
    assert got.dtype == np.int64
    assert sorted(got.tolist()) == list(range(rows))
    whole = order(rows, block_rows=block_rows, window_rows=window_rows, epoch=epoch).indices(0, rows)
    np.testing.assert_array_equal(got, whole)


@given(st.integers(0, 100), st.integers(0, 100))
def test_any_range_is_that_part_of_the_epoch(a, b):
    start, stop = min(a, b), max(a, b)
    for settings_ in ({}, {"block_rows": 7, "window_rows": 30}):
        one = order(100, **settings_)
        whole = one.indices(0, 100)
        np.testing.assert_array_equal(one.indices(start, stop), whole[start:stop])


def test_the_order_depends_on_each_argument_and_on_nothing_else():
    for sizes in ({}, {"block_rows": 10, "window_rows": 100}):
        base = order(1000, **sizes).indices(0, 1000)
        np.testing.assert_array_equal(order(1000, **sizes).indices(0, 1000), base)
        for change in ({"seed": 2}, {"epoch": 3}, {"digest": "e"}):
            assert (order(1000, **sizes, **change).indices(0, 1000) != base).mean() > 0.9


def test_the_order_is_the_same_in_every_release():
    assert order(10).indices(0, 10).tolist() == GOLDEN_SMALL
    assert order(20, block_rows=3, window_rows=7).indices(0, 20).tolist() == GOLDEN_WINDOWS


GOLDEN_SMALL = [3, 2, 6, 4, 9, 8, 0, 1, 5, 7]
GOLDEN_WINDOWS = [18, 5, 19, 3, 4, 8, 9, 6, 7, 11, 10, 14, 0, 13, 1, 2, 12, 17, 16, 15]


def test_a_window_holds_whole_blocks_in_mixed_order():
    rows, block_rows = 1000, 10
    got = order(rows, block_rows=block_rows, window_rows=50).indices(0, rows).reshape(-1, 50)
    for window in got:
        counts = np.unique(window // block_rows, return_counts=True)[1]
        assert counts.tolist() == [10] * 5
        assert (np.diff(window) < 0).sum() > 10  # shuffled inside
    first_blocks = got[:, 0] // block_rows
    assert (np.diff(first_blocks) < 0).any()  # and blocks are not in the order of the disk


def test_small_epochs_are_uniform_permutations():
    counts = np.zeros((4, 4))
    for epoch in range(2000):
        counts[np.arange(4), order(4, epoch=epoch).indices(0, 4)] += 1
    # Expected 500 each, standard deviation 19.4; six of them leave one false alarm in 30 million.
    assert np.abs(counts - 500).max() < 6 * 19.4


def test_only_the_windows_needed_are_made():
    one = order(10**9, block_rows=4096, window_rows=8192)
    got = one.indices(10**9 - 5, 10**9)
    assert len(set(got.tolist())) == 5
    assert one._window.size <= 8192


def test_ranges_outside_the_epoch_are_refused():
    for start, stop in [(-1, 3), (0, 11), (5, 4)]:
        with pytest.raises(IndexError, match="reach outside an epoch of 10 rows"):
            order(10).indices(start, stop)
    with pytest.raises(ConfigError, match="block_rows=0"):
        order(10, block_rows=0)
