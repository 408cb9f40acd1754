"""The weighted mean is exact, and the same to the last bit whoever arrives first."""

from __future__ import annotations

import math
import random
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparkdeep.tensors.mean import OrderedSum, reduced_weights
from sparkdeep.tensors.pooling import Pooling


def mean_of(vectors, weights, *, order=None, chunk=1 << 18, delay=lambda: None, window=None):
    """Add the vectors from threads that start in `order`, each chunk after a delay; `window`: chunks with room at a time."""
    sums = None if window is None else torch.empty(window * chunk, dtype=torch.float64)
    total = OrderedSum(len(vectors[0]), weights, chunk=chunk, sums=sums)

    def give_up():
        assert time.monotonic() < deadline, "a turn never came"

    def chunks_of(vector):
        def chunks(start, stop):
            delay()
            return vector[start:stop]

        return chunks

    deadline = time.monotonic() + 20.0
    threads = [
        threading.Thread(target=total.add, args=(i, chunks_of(vectors[i]), give_up))
        for i in order or range(len(vectors))
        if weights[i] > 0
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20.0)
    return total.mean()


def vectors(count, numel=50, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 20, (count, numel), generator=generator)
    return list((torch.randn(count, numel, generator=generator) * 2.0**exponents).to(dtype))


WEIGHTS = st.lists(st.integers(0, 10_000).map(float) | st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 1000))
def test_the_mean_is_that_of_numpy_in_float64(weights, seed):
    assume(sum(weights) > 0)
    parts = vectors(len(weights), seed=seed)
    got = mean_of(parts, weights, chunk=16).numpy()
    expected = np.average(
        np.stack([p.double().numpy() for p in parts]), axis=0, weights=np.asarray(weights) / max(weights)
    )
    scale = np.max(np.abs(np.stack([p.double().numpy() for p in parts])), axis=0)
    np.testing.assert_array_less(np.abs(got - expected), 1e-14 * scale)


@pytest.mark.identity(2)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(2, 6))
def test_not_a_bit_depends_on_who_arrives_first(data, count):
    weights = [float(w) for w in data.draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))]
    assume(sum(weights) > 0)
    parts = vectors(count)
    order = data.draw(st.permutations(range(count)))
    expected = mean_of(parts, weights, chunk=7)
    assert torch.equal(mean_of(parts, weights, order=order, chunk=7), expected)


def test_random_delays_change_not_a_bit_while_another_order_of_adding_would():
    parts = vectors(5, dtype=torch.float64)
    weights = [3.0, 1.0, 0.0, 2.0, 7.0]
    generator = random.Random(0)
    expected = mean_of(parts, weights, chunk=10)
    for _ in range(5):
        order = generator.sample(range(5), 5)
        for window in (None, 1, 2):
            options = {"delay": lambda: time.sleep(generator.random() * 0.003), "window": window}
            delayed = mean_of(parts, weights, order=order, chunk=10, **options)
            assert torch.equal(delayed, expected)
    backwards = mean_of(parts[::-1], weights[::-1], chunk=10)
    assert not torch.equal(backwards, expected)
    forwards, reverse = sum(p.float() for p in parts), sum(p.float() for p in parts[::-1])
    assert not torch.equal(forwards, reverse)


@pytest.mark.identity(2)
@pytest.mark.parametrize("count", [2, 3, 7, 10, 49])
def test_the_mean_of_identical_replicas_is_the_replica_to_the_last_bit(count):
    (part,) = vectors(1, numel=2000)
    assert torch.equal(mean_of([part] * count, [640.0] * count).float(), part)
    uneven = [float(1 + 37 * i % 101) for i in range(count)]
    assert torch.equal(mean_of([part] * count, uneven).float(), part)
    in_float32 = sum(torch.tensor(w) * part for w in uneven) / sum(uneven)
    assert count < 3 or not torch.equal(in_float32, part)


def test_a_lone_replica_is_copied_exactly_also_in_float64():
    (part,) = vectors(1, dtype=torch.float64)
    assert torch.equal(mean_of([part], [7.3]), part)
    assert torch.equal(mean_of([part * 5, part, part * 9], [0.0, 1234.0, 0.0]), part)
    assert not torch.equal(part * 7.3 / 7.3, part)


def test_whole_weights_give_the_correctly_rounded_sum():
    parts, weights = vectors(3, numel=20), [10.0, 30.0, 24.0]
    got = mean_of(parts, weights)
    for i in range(20):
        exact = sum(Fraction(p[i].item()) * int(w) for p, w in zip(parts, weights, strict=True)) / 64
        assert math.isclose(
            got[i].item(), float(exact), rel_tol=1e-14, abs_tol=1e-14 * float(max(p[i].abs() for p in parts))
        )


@pytest.mark.parametrize(
    ("weights", "reduced"),
    [
        ([20.0, 20.0], [1.0, 1.0]),
        ([10.0, 30.0, 24.0], [5.0, 15.0, 12.0]),
        ([0.0, 7.5], [0.0, 1.0]),
        ([0.0, 4.0, 6.0], [0.0, 2.0, 3.0]),
        ([0.5, 1.5], [0.5, 1.5]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_weights_lose_what_they_share(weights, reduced):
    assert reduced_weights(weights) == reduced


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_no_weights_are_refused(weight):
    with pytest.raises(ValueError, match="finite and not negative"):
        reduced_weights([1.0, weight])


def test_a_mean_is_refused_while_a_replica_is_missing():
    total = OrderedSum(3, [1.0, 2.0])
    total.add(0, lambda start, stop: torch.ones(stop - start), lambda: None)
    with pytest.raises(AssertionError, match=r"replicas \[1\] have not added"):
        total.mean()
    with pytest.raises(AssertionError, match="no replica"):
        OrderedSum(3, [0.0]).mean()


def test_a_wait_for_a_turn_can_be_given_up():
    class GivenUpError(Exception):
        pass

    def give_up():
        raise GivenUpError

    with pytest.raises(GivenUpError):
        OrderedSum(3, [1.0, 1.0]).add(1, lambda start, stop: torch.ones(stop - start), give_up)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_replica_that_is_ahead_waits_for_room(window):
    class GivenUpError(Exception):
        pass

    def give_up():
        raise GivenUpError

    def chunks(start, stop):
        asked.append(start)
        return torch.ones(stop - start)

    asked = []
    total = OrderedSum(50, [1.0, 1.0], chunk=10, sums=torch.empty(window * 10, dtype=torch.float64))
    with pytest.raises(GivenUpError):
        total.add(0, chunks, give_up)
    assert asked == [10 * i for i in range(window + 1)], "the last was read and has no room yet"


# -- buffers ------------------------------------------------------------------------------------------------------


def test_variances_are_pooled_to_those_of_the_concatenated_data():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)) * s + m for n, s, m in [(10, 1, -2), (30, 2, 0), (24, 3, 8)]]
    replicas = [{"mean": torch.from_numpy(p.mean(0)), "var": torch.from_numpy(p.var(0))} for p in parts]
    everything = np.concatenate(parts)
    pooled = Pooling(variance_of={"var": "mean"}).pool(replicas, [10, 30, 24], {})
    np.testing.assert_allclose(pooled["mean"].numpy(), everything.mean(0), rtol=1e-13)
    np.testing.assert_allclose(pooled["var"].numpy(), everything.var(0), rtol=1e-13)
    naive = Pooling().pool(replicas, [10, 30, 24], {})
    assert (naive["var"].numpy() < 0.8 * everything.var(0)).all()


def test_buffers_keep_dtype_and_shape_and_whole_numbers_take_the_maximum():
    replicas = [
        {
            "count": torch.tensor(count),
            "flag": torch.tensor([flag, False]),
            "half": torch.full((2, 2), float(count), dtype=torch.bfloat16),
            "mask": torch.tensor([-math.inf, 0.0]),
            "none": torch.empty(0),
        }
        for count, flag in [(3, False), (7, True), (99, True)]
    ]
    pooled = Pooling().pool(replicas, [1.0, 3.0, 0.0], {})
    assert pooled["count"].item() == 7
    assert pooled["count"].dtype == torch.int64
    assert pooled["flag"].tolist() == [True, False]
    assert pooled["half"].dtype == torch.bfloat16
    assert pooled["half"].tolist() == [[6.0, 6.0], [6.0, 6.0]]
    assert pooled["mask"].tolist() == [-math.inf, 0.0]
    assert pooled["none"].shape == (0,)
