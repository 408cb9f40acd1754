"""Batches gathered ahead: the same bits as without, errors where they belong, and no thread left behind."""

from __future__ import annotations

import threading
import traceback
from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import train_plainly
from torch import nn
from twin import flat, schema_of, write_shards

from sparkdeep.data.batches import Batch
from sparkdeep.data.feed import Feed
from sparkdeep.data.order import EpochOrder
from sparkdeep.data.prefetch import prefetch_count, prefetched
from sparkdeep.data.shards import Shard
from sparkdeep.errors import ConfigError, ReplicaLostError
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import RoundSpec
from sparkdeep.replica.replica import Replica
from sparkdeep.settings.run import LocalSettings

X = np.random.default_rng(0).standard_normal((37, 3)).astype(np.float32)
Y = X.sum(1, keepdims=True)
CPU = torch.device("cpu")


def threads():
    return [t for t in threading.enumerate() if t.name == "sparkdeep-prefetch"]


@pytest.fixture
def shard(tmp_path):
    [path] = write_shards(tmp_path, [{"features": X, "label": Y}], schema_of(X, Y))
    shard = Shard.open(path)
    yield shard
    shard.close()


def replica_of(shard, ahead, **parts):
    torch.manual_seed(1)
    program = Program(
        model=nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)),
        loss=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        **parts,
    )
    settings = LocalSettings(batch_size=4, prefetch=ahead)
    return Replica(program, settings, schema_of(X, Y), shard, number=0, device=CPU)


def rounds(replica, epochs=2, every=3):
    for epoch in range(epochs):
        for first in range(0, replica.steps_per_epoch, every):
            replica.train(RoundSpec(round=1, epoch=epoch, first_step=first, num_steps=every))


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_training_is_the_plain_loop_bit_for_bit_however_much_is_read_ahead(shard, ahead):
    def noisy(x):  # draws from the same generator as dropout: an item out of turn would change both
        return x + torch.randn_like(x) + float(np.random.rand())

    class Noisy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(noisy(x))

    replica = replica_of(shard, ahead, augment=noisy)
    rounds(replica)
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1))
    np.random.seed(0)
    train_plainly(
        Noisy(plain),
        X,
        Y,
        digest=shard.info.digest,
        loss=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        epochs=2,
        batch_size=4,
    )
    assert torch.isfinite(flat(plain)).all()
    assert torch.equal(flat(replica.model), flat(plain))
    assert not threads()


def test_users_code_runs_in_the_training_thread(shard):
    seen = set()

    def preprocess(x):
        seen.add(threading.current_thread())
        return x

    rounds(replica_of(shard, 3, preprocess=preprocess), epochs=1)
    assert seen == {threading.current_thread()}


def test_a_round_that_fails_leaves_no_thread(shard):
    def breaks(x):
        assert threads(), "nothing is read ahead, so nothing is tested"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rounds(replica_of(shard, 2, augment=breaks))
    assert not threads()


def test_a_disk_that_fails_while_reading_ahead_costs_the_replica_and_not_the_run(shard, monkeypatch):
    gather, calls = shard.gather, []

    def fails(split, indices):
        calls.append(threading.current_thread().name)
        if len(calls) == 4:
            raise OSError(5, "Input/output error")
        return gather(split, indices)

    class Failing:
        info, gather = shard.info, staticmethod(fails)

    replica = replica_of(shard, 2)
    monkeypatch.setattr(replica._reader._feed, "_shard", Failing())
    with pytest.raises(ReplicaLostError, match="disk failed while it read the shard: OSError") as caught:
        rounds(replica, every=9)
    assert set(calls) == {"sparkdeep-prefetch"}
    assert "in fails" in "".join(traceback.format_exception(caught.value))
    assert not threads()


def test_no_more_is_made_than_may_wait():
    made, release = [], threading.Event()

    def items():
        for i in range(100):
            made.append(i)
            if i == 3:
                release.set()  # 0 is out, 1 and 2 wait, 3 is made and waits for room
            yield i

    with prefetched(items(), 2) as ahead:
        assert next(ahead) == 0
        assert release.wait(10)
        assert made == [0, 1, 2, 3]
    assert made[-1] <= 4
    assert not threads()


def test_items_end_once_and_stay_ended():
    with prefetched(iter("abc"), 2) as ahead:
        assert list(ahead) == ["a", "b", "c"]
        assert list(ahead) == []


def test_a_gpu_is_fed_ahead_from_pinned_memory_and_a_cpu_is_not(monkeypatch):
    assert prefetch_count("auto", CPU) == 0
    assert prefetch_count("auto", torch.device("cuda:0")) == 2
    assert prefetch_count(5, CPU) == 5
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: ("pinned", tensor.tolist()))
    batch = Batch(features={"a": torch.tensor([1])}, labels=torch.tensor([2]), weights=None, rows=1, epoch=3, index=4)
    pinned = batch.pinned()
    assert (pinned.features, pinned.labels, pinned.weights) == ({"a": ("pinned", [1])}, ("pinned", [2]), None)
    assert (pinned.rows, pinned.epoch, pinned.index) == (1, 3, 4)


@pytest.mark.parametrize("value", [-1, 1.5, "always", True])
def test_an_impossible_prefetch_is_refused(value):
    with pytest.raises(ConfigError, match="prefetch="):
        LocalSettings(prefetch=value)


@pytest.mark.parametrize(("first", "start_window"), [(0, 0), (30, 3)])
def test_every_block_is_asked_for_once_before_its_rows_are(tmp_path, first, start_window):
    rows, block, window = 1000, 10, 40
    x = np.arange(rows, dtype=np.float32).reshape(-1, 1)
    [path] = write_shards(tmp_path, [{"features": x}], schema_of(x))
    with_log = []

    class Logged:
        def __init__(self, shard):
            self.info, self._shard = shard.info, shard

        def will_need(self, split, start, stop):
            with_log.append(("ask", set(range(start, stop))))
            self._shard.will_need(split, start, stop)

        def gather(self, split, indices):
            with_log.append(("take", set(indices.tolist())))
            return self._shard.gather(split, indices)

    shard = Shard.open(path)
    feed = Feed(Logged(shard), batch_size=4, accumulate_batches=1, seed=0, block_rows=block, window_rows=window)
    taken = list(feed.batches(0, first, 45)) + list(feed.batches(0, 45, 250))
    shard.close()
    order = EpochOrder(rows, seed=0, epoch=0, digest=shard.info.digest, block_rows=block, window_rows=window)
    got = np.concatenate([fields["features"][:, 0] for _, fields in taken])
    assert got.astype(int).tolist() == order.indices(first * 4, rows).tolist()
    asked = [rows for kind, rows in with_log if kind == "ask"]
    assert len(set().union(*asked)) == sum(map(len, asked)) == rows - start_window * window
    known = set()
    for kind, some in with_log:
        if kind == "ask":
            known |= some
        else:
            assert some <= known
