"""`aggregation="ring"`: the bits of the star, a fraction of the driver's bytes, and an end when a replica is lost."""

from __future__ import annotations

import dataclasses
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from twin import deal, flat, local_coordinator, make_fit, run, schema_of
from twin_faults import Plan, lost, marked_table

from sparkdeep.errors import ConfigError, ReplicaLostError
from sparkdeep.models.program import Program
from sparkdeep.replica.ring import Ring
from sparkdeep.stages.ring import Trial, choose, needs_trial, ring_s, star_s
from sparkdeep.tensors.mean import OrderedSum, Partition, weighted_mean


def program(seed=0, optimizer=None, augment=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1))
    optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.9)
    return Program(model=model, loss=nn.MSELoss(), optimizer=optimizer, augment=augment)


def fitted(tmp_path, sizes, own=None, **options):
    x, y = marked_table(sizes)
    settings = {"epochs": 3, "batch_size": 4, "sync_every": 2, **options}
    return run(tmp_path, own or program(), deal(x, y, sizes), schema_of(x, y), **settings)


@pytest.mark.identity(2)
@pytest.mark.parametrize("sizes", [[12, 12], [9, 14, 30], [5, 5, 5, 21, 2]], ids=str)
def test_the_ring_gives_the_bits_of_the_star(tmp_path, sizes):
    """Uneven rows, replicas that run out of them, and a vector that no number of replicas divides."""
    star, _, _ = fitted(tmp_path, sizes, aggregation="star")
    ring, records, _ = fitted(tmp_path, sizes, aggregation="ring")
    assert torch.equal(flat(star), flat(ring))
    assert all(torch.equal(a, b) for a, b in zip(star.buffers(), ring.buffers(), strict=True))
    assert {record.aggregation for record in records} == {"ring"}


def test_averaged_optimizer_state_goes_around_too(tmp_path):
    options = {"own": program(optimizer=partial(Adam, lr=0.01)), "inner_state": "average"}
    star, _, _ = fitted(tmp_path, [9, 14, 30], aggregation="star", **options)
    options["own"] = program(optimizer=partial(Adam, lr=0.01))
    ring, _, _ = fitted(tmp_path, [9, 14, 30], aggregation="ring", **options)
    assert torch.equal(flat(star), flat(ring))


def test_an_outer_optimizer_and_stages_of_one_round(tmp_path):
    x, y = (column.astype(np.float64) for column in marked_table([9, 14, 30]))

    def trained(**options):
        own = dataclasses.replace(program(), model=program().model.double())
        outer = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
        parts = deal(x, y, [9, 14, 30])
        settings = {"epochs": 3, "batch_size": 4, "sync_every": 2, "outer_optimizer": outer, **options}
        return flat(run(tmp_path, own, parts, schema_of(x, y), **settings)[0])

    assert torch.equal(trained(aggregation="star"), trained(aggregation="ring", rounds_per_stage=2))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1000, 300)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("count", [2, 4])
def test_the_driver_moves_two_vectors_whatever_the_number_of_replicas(tmp_path, count):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(count * 4, 1000)).astype(np.float32), rng.normal(size=(count * 4, 300)).astype(np.float32)
    size = sum(p.nbytes for p in Wide().parameters())

    def moved(aggregation, **options):
        own = Program(model=Wide(), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.1))
        _, records, _ = run(
            tmp_path,
            own,
            deal(x, y, [4] * count),
            schema_of(x, y),
            epochs=2,
            sync_every=1,
            aggregation=aggregation,
            rounds_per_stage=100,  # the first round of a stage moves more
            **options,
        )
        return (records[-1].sent_bytes + records[-1].received_bytes) / size

    assert 1.0 <= moved("ring") < 1.05  # the mean; replicas have handed it round when the next round begins
    assert 2.0 <= moved("ring", outer_optimizer=partial(SGD, lr=1.0)) < 2.05
    assert 2.0 * count <= moved("star") < 2.05 * count


def test_a_replica_lost_in_mid_round_ends_the_collective_and_the_round_is_repeated(tmp_path):
    sizes = [9, 14, 30]
    x, y = marked_table(sizes)
    options = {"epochs": 3, "batch_size": 4, "sync_every": 2, "aggregation": "ring", "rounds_per_stage": 100}
    expected, _, _ = run(tmp_path, program(), deal(x, y, sizes), schema_of(x, y), **options)
    plan = Plan({(1, 5): lost("the executor went away")})
    own = program(augment=plan.hook())
    got, records, _ = run(tmp_path, own, deal(x, y, sizes), schema_of(x, y), wrap=plan.wrap, **options)
    assert torch.equal(flat(got), flat(expected))
    assert sum(record.retries for record in records) == 1
    assert plan.launches == 2


# -- the group itself ---------------------------------------------------------------------------------------------


class Board:
    """A meeting in memory."""

    def __init__(self):
        self._values, self._news = {}, threading.Condition()

    def put(self, key, value):
        with self._news:
            self._values[key] = value
            self._news.notify_all()

    def get(self, key):
        with self._news:
            if not self._news.wait_for(lambda: key in self._values, timeout=10):
                raise RuntimeError(f"nobody stored {key}")
            return self._values[key]


def together(size, work, timeout_s=10.0):
    """Run `work(ring, rank)` in a thread a rank; returns results or exceptions."""
    board, results = Board(), [None] * size

    def member(rank):
        try:
            ring = Ring(board, rank, size, host="127.0.0.1", device=torch.device("cpu"), timeout_s=timeout_s)
            results[rank] = work(ring, rank)
            ring.close()
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


@pytest.mark.parametrize(("size", "numel"), [(2, 10), (3, 100), (4, 3), (5, 1001)])
def test_parts_add_up_to_the_weighted_mean_and_come_back_whole(size, numel):
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(numel, generator=generator) for _ in range(size)]
    weights = [float(i * 7 % 5) for i in range(1, size + 1)]

    def work(ring, rank):
        part = ring.reduce(vectors[rank] if weights[rank] else torch.empty(0), numel, weights).clone()
        whole = torch.empty(numel)
        ring.gather(part, whole)
        return whole

    expected = sum(w * v.double() for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    for whole in together(size, work):
        torch.testing.assert_close(whole, expected.float(), rtol=0, atol=0)


def test_a_member_that_stays_away_ends_the_others_wait():
    over = threading.Event()

    def work(ring, rank):
        if rank == 1:
            over.wait(60.0)
            return None
        began = time.monotonic()
        with pytest.raises(
            ReplicaLostError, match=r"ring of 2 replicas could not add up its updates within 4 s.*'star'"
        ):
            ring.reduce(torch.ones(4), 4, [1.0, 1.0])
        over.set()
        return time.monotonic() - began

    waited, _ = together(2, work, timeout_s=4.0)
    assert 0.5 < waited < 25.0


def test_the_mean_of_whole_vectors_is_the_sum_in_order():
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(1000, generator=generator) * 10.0**i for i in range(4)]
    weights = [3.0, 0.0, 5.0, 0.3]
    total = OrderedSum(1000, weights, chunk=64)
    for i in (0, 2, 3):
        total.add(i, lambda start, stop, i=i: vectors[i][start:stop], lambda: None)
    out = weighted_mean(vectors, weights, torch.empty(1000, dtype=torch.float64), chunk=50)
    assert torch.equal(out, total.mean())


@pytest.mark.parametrize(("numel", "count"), [(10, 3), (3, 5), (1, 1), (8, 4)])
def test_parts_cover_a_vector_once(numel, count):
    bounds = [Partition(numel, count).bounds(i) for i in range(count)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(numel))


# -- the choice ---------------------------------------------------------------------------------------------------


def test_the_ring_is_chosen_where_it_was_clearly_faster():
    trial = Trial(num_bytes=4_000_000, star_s=0.1, ring_s=0.02)
    assert choose(8, 400_000_000, trial, outer=False) == "ring"
    assert star_s(400_000_000, trial) == pytest.approx(10.0)
    assert ring_s(8, 400_000_000, trial, outer=False) == pytest.approx(2.0)
    assert ring_s(8, 400_000_000, trial, outer=True) == pytest.approx(2.0 + 10.0 / 8)
    assert ring_s(8, 1000, trial, outer=False) == pytest.approx(0.02)
    close = Trial(num_bytes=4_000_000, star_s=0.1, ring_s=0.095)
    assert choose(2, 4_000_000, close, outer=False) == "star"
    assert not needs_trial(1, 400_000_000)
    assert not needs_trial(32, 1000)


def test_auto_tries_both_on_the_replicas_themselves(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 1000)).astype(np.float32), rng.normal(size=(12, 300)).astype(np.float32)
    results = []
    for aggregation in ("star", "auto"):
        own = Program(model=Wide(), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.1))
        model, records, _ = run(
            tmp_path, own, deal(x, y, [4] * 3), schema_of(x, y), epochs=2, sync_every=1, aggregation=aggregation
        )
        assert {record.aggregation for record in records} <= {"star", "ring"}
        results.append(flat(model))
    assert torch.equal(*results)  # whichever it was


def test_auto_chooses_once_and_a_resume_keeps_it(tmp_path, monkeypatch):
    import sparkdeep.stages.opener as module

    asked = []

    def choice(count, size, trial, *, outer):
        asked.append((count, size, trial.star_s > 0 and trial.ring_s > 0))
        return "ring"

    monkeypatch.setattr(module, "needs_trial", lambda _count, _size: True)
    monkeypatch.setattr(module, "choose", choice)
    _, records, fit = fitted(tmp_path, [9, 14, 30], aggregation="auto", rounds_per_stage=2)
    assert len(asked) == 1
    assert asked[0][0] == 3
    assert asked[0][2]
    assert {record.aggregation for record in records} == {"ring"}
    files = fit.state.to_files(fit.layout, {}, [])
    coordinator = local_coordinator()
    try:
        x, y = marked_table([9, 14, 30])
        again = make_fit(tmp_path, program(), deal(x, y, [9, 14, 30]), schema_of(x, y), coordinator=coordinator)
        again.state.restore(again.layout, files, again.local, again.settings)
    finally:
        coordinator.close()
    assert again.state.aggregation == "ring"


@pytest.mark.parametrize("options", [{"overlap": 1}, {"codec": "int8"}, {"down_codec": "bf16"}], ids=str)
def test_a_ring_takes_whole_parameters_in_time(tmp_path, options):
    with pytest.raises(ConfigError, match="aggregation='ring'"):
        fitted(tmp_path, [9, 14, 30], aggregation="ring", **options)
