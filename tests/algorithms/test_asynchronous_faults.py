"""Asynchronous windows in which something fails are undone and repeated."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from asynchronous_runs import (
    SCHEMA,
    SIZES,
    X,
    Y,
    dropping,
    options_of,
    program,
    train,
)
from twin import deal, local_coordinator, make_fit

from sparkdeep.errors import NonFiniteError, ReplicaLostError
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.outer import DelayedNesterov, Downpour
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.testing.injection import Injector

# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["step", "transfer", "corrupt"])
def test_a_window_in_which_a_replica_was_lost_is_undone_and_repeated(tmp_path, phase):
    rule, outer = Asynchronous(1, 1), partial(Downpour, lr=0.02)
    got, records, _ = train(tmp_path, rule, outer, own=dropping())
    plan = Injector(tmp_path / "plan")
    if phase == "corrupt":
        plan.corrupt_at("transfer", 2, 1)
    else:
        plan.fail_at(phase, 2, 1)
    with plan.installed(), pytest.raises(ReplicaLostError):
        train(tmp_path, rule, outer, own=dropping(), replay=records)
    plan.check_fired()
    plan = Injector(tmp_path / "again")
    plan.corrupt_at("transfer", 2, 1) if phase == "corrupt" else plan.fail_at(phase, 2, 1)
    with plan.installed():
        again, repeated, _ = train(tmp_path, rule, outer, own=dropping(), replay=records, max_retries=2)
    assert torch.equal(got, again)
    assert [r.retries for r in repeated] == [0, 1]
    assert [r.arrivals for r in repeated] == [r.arrivals for r in records]


class Fails:
    """Raises, or gives NaN, in the n-th batch of a shard."""

    def __init__(self, batch):
        self.batch, self.calls = batch, 0

    def __call__(self, features):
        self.calls += 1
        return features * float("nan") if self.calls == self.batch else features


def test_a_push_that_is_not_finite_ends_the_fit_and_leaves_no_trace(tmp_path):
    coordinator = local_coordinator()
    try:
        sizes = [24, 24]
        fit = make_fit(
            tmp_path, program(augment=Fails(9), buffers={"augment.calls": "local"}), deal(X[:48], Y[:48], sizes), SCHEMA, coordinator=coordinator,
            **options_of(Asynchronous(1, 1), partial(Downpour, lr=0.02)),
        )  # fmt: skip
        rounds = fit.rounds()
        next(rounds)
        before = fit.state.parameters.detach().clone()
        squares = copy.deepcopy(fit.outer.state_dict())
        with pytest.raises(NonFiniteError, match="round 2"):
            next(rounds)
        assert torch.equal(fit.state.parameters, before)
        for place, state in fit.outer.state_dict()["state"].items():
            assert torch.equal(state["sum"], squares["state"][place]["sum"])
    finally:
        coordinator.close()


def test_a_run_resumed_from_a_checkpoint_is_the_undisturbed_one(tmp_path):
    rule, outer = Asynchronous(1, 2), partial(DelayedNesterov, lr=0.3, delay=2)
    settings = {"epochs": 4, "checkpoint_every": 1}
    got, records, _ = train(tmp_path, rule, outer, own=dropping(), **settings)
    coordinator = local_coordinator()
    folder = tmp_path / "checkpoints"
    try:
        fit = make_fit(
            tmp_path, dropping(), deal(X[:48], Y[:48], SIZES), SCHEMA, coordinator=coordinator, replay=records,
            checkpoints=CheckpointDirectory(LocalStore(folder), identity={}),
            **options_of(rule, outer, **settings),
        )  # fmt: skip
        rounds = fit.rounds()
        assert [next(rounds).round, next(rounds).round] == [1, 2]
        rounds.close()
    finally:
        coordinator.close()
    again, rest, fit = train(
        tmp_path, rule, outer, own=dropping(), replay=records, **settings,
        checkpoints=CheckpointDirectory(LocalStore(folder), identity={}),
    )  # fmt: skip
    assert [r.round for r in rest] == [3, 4]
    assert torch.equal(got, again)
    assert [r.arrivals for r in fit.state.records] == [r.arrivals for r in records]
