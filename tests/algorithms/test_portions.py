"""Gradients by portions: how many there are, who answers first and twice changes nothing; each counts once."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import LBFGS
from twin import deal, facts_of, flat, run, schema_of, write_shards

from sparkdeep.data.portions import pieces_of, unpack
from sparkdeep.data.shards import Shard
from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.models.program import Program
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.stages.jobs import JobStages
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.testing.in_process import InProcessRunner

WOLFE = partial(LBFGS, history_size=10, line_search_fn="strong_wolfe")


def program():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Program(model=model, loss=nn.MSELoss(), optimizer=torch.optim.SGD)


def table():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 3)), rng.normal(size=(40, 2))


class Unruly:
    """Runs jobs as Spark does where it speculates: in any order, tasks twice at a time, of which the first answer counts."""

    def __init__(self, inner, change=lambda replies: replies):
        self._inner = inner
        self._change = change
        self._random = np.random.default_rng(7)
        self.num_replicas, self.keeps_states, self.exchange = inner.num_replicas, inner.keeps_states, None
        self.ship, self.renew = inner.ship, inner.renew
        self.jobs = []

    def run(self, order, description, **given):
        self.jobs.append(order.kind)
        replies = [*self._inner.run(order, description, **given), *self._inner.run(order, description, **given)]
        first = {}
        for place in self._random.permutation(len(replies)):
            first.setdefault(replies[place].header["replica"], replies[place])
        return self._change(list(first.values()))


def make(tmp_path, sizes, *, wrap=None, validation=False, checkpoints=None, **options):
    x, y = table()
    schema, own = schema_of(x, y), program()
    held_out = deal(x, y, sizes) if validation else None
    paths = write_shards(tmp_path / new_run_id(), deal(x, y, sizes), schema, held_out)
    settings = {"work": "gradient", "sync_every": "epoch", "epochs": 6, "portions": len(sizes), **options}
    local, name = LocalSettings(batch_size=8), new_run_id()
    runner = InProcessRunner(local, paths, tmp_path / f"state-{name}", run=name, keeps_states=False)
    return Fit(
        program=own,
        local=local,
        settings=RunSettings(num_workers=2, retry_backoff_s=0.01, **settings),
        plan=plan_of(own, local, schema, steps=False),
        shards=facts_of(paths),
        stages=JobStages(runner=wrap(runner) if wrap else runner),
        run=name,
        outer_optimizer=WOLFE,
        checkpoints=checkpoints,
    )


def finished(fit):
    records = list(fit.rounds())
    return fit.state.parameters.detach().clone(), records


@pytest.mark.identity(10)
@pytest.mark.parametrize("sizes", [[40], [13, 27], [5] * 8, [1, 0, 20, 3, 0, 16]])
def test_the_number_of_portions_changes_nothing(tmp_path, sizes):
    expected, _ = finished(make(tmp_path, [20, 20]))
    moved, records = finished(make(tmp_path, sizes))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-11)
    assert all(record.rows == 40 * sum(not e.cached for e in record.evaluations) for record in records)
    other, _ = finished(make(tmp_path, [20, 20], epochs=5))
    assert (other - expected).abs().max() > 1e-6


@pytest.mark.identity(10)
def test_who_answers_first_and_who_answers_twice_changes_not_a_bit(tmp_path):
    calm, _ = finished(make(tmp_path, [5] * 8))
    runners = []
    moved, records = finished(make(tmp_path, [5] * 8, wrap=lambda inner: runners.append(Unruly(inner)) or runners[0]))
    assert torch.equal(moved, calm)
    asked = sum(not one.cached for record in records for one in record.evaluations)
    assert runners[0].jobs == ["train"] * asked, "a job an evaluation, and no other"


def test_portions_give_the_bits_of_replicas_that_hold_the_same_rows(tmp_path):
    x, y = table()
    by_portions, _ = finished(make(tmp_path, [13, 27]))
    options = {"work": "gradient", "sync_every": "epoch", "epochs": 6, "batch_size": 8, "outer_optimizer": WOLFE}
    by_replicas = flat(run(tmp_path, program(), deal(x, y, [13, 27]), schema_of(x, y), **options)[0])
    assert torch.equal(by_portions, by_replicas)


@pytest.mark.parametrize(
    ("change", "what"),
    [(lambda replies: [*replies, replies[0]], "4 replies"), (lambda replies: replies[1:], "2 replies")],
    ids=["one twice", "one missing"],
)
def test_a_job_in_which_a_portion_is_not_there_exactly_once_does_not_count(tmp_path, change, what):
    fit = make(tmp_path, [10, 10, 20], wrap=lambda inner: Unruly(inner, change))
    before = fit.state.parameters.detach().clone()
    with pytest.raises(ProtocolError, match=what):
        list(fit.rounds())
    assert torch.equal(fit.state.parameters, before)


def test_validation_rows_are_scored_by_portions_too(tmp_path):
    fit = make(tmp_path, [13, 27], validation=True)
    records = list(fit.rounds())
    fit.load_result()
    x, y = map(torch.from_numpy, table())
    with torch.no_grad():
        loss = float(nn.functional.mse_loss(fit.program.model(x), y))
    assert abs(records[-1].metrics["loss"] - loss) < 1e-12
    assert abs(records[-1].loss - loss) < 1e-12, "validated on the training rows"


def test_a_run_by_portions_is_resumed_from_its_checkpoint_with_the_same_bits(tmp_path):
    whole, _ = finished(make(tmp_path, [13, 27]))
    store = LocalStore(tmp_path / "checkpoints")
    first = make(tmp_path, [13, 27], checkpoints=CheckpointDirectory(store, identity={}), checkpoint_every=1)
    going = first.rounds()
    for _ in range(3):
        next(going)
    going.close()
    second = make(tmp_path, [13, 27], checkpoints=CheckpointDirectory(store, identity={}), checkpoint_every=1)
    assert second.resumed_from == 3
    assert torch.equal(finished(second)[0], whole)


def test_auto_is_eight_a_worker():
    assert RunSettings(num_workers=3, work="gradient", portions="auto", sync_every="epoch").num_tasks == 24
    assert RunSettings(num_workers=3, work="gradient", portions=5, sync_every="epoch").num_tasks == 5
    assert RunSettings(num_workers=3).num_tasks == 3


def test_a_portion_moves_as_pieces_and_is_the_same_shard(tmp_path):
    x, y = table()
    schema = schema_of(x, y)
    (path,) = write_shards(tmp_path / "made", deal(x, y, [40]), schema)
    pieces = list(pieces_of(path))
    for _ in range(2):  # the second time it is there already
        unpack(pieces, tmp_path / "portion")
    shard = Shard.open(tmp_path / "portion")
    assert shard.info == Shard.open(path).info
    np.testing.assert_array_equal(shard.take("train", np.arange(40))["features"], x)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "portion").iterdir()} == {0o600}
    for damaged in ([], pieces[:-1], pieces[1:2]):
        with pytest.raises(ReplicaLostError, match="pieces"):
            unpack(damaged, tmp_path / "another")
        assert not list(tmp_path.glob("*another*"))
