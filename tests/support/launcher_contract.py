"""What every launcher must keep, whatever its replicas run in; see test_launcher_contract.py for how to join.

A test module imports these functions and gives a fixture `world` with

    world.fit(program, parts, schema, **options)   a context that yields a Fit over `parts`, one a replica
    world.running()                                names of what still runs on behalf of a fit; [] when all is over
    world.printed(capfd, lines)                    everything that replicas printed; `lines` came through on_log
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, flat, schema_of

from sparkdeep.errors import NonFiniteError, UserCodeError
from sparkdeep.models.program import Program

# Executors need not be able to import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SIZES = [9, 14]
IDLE_S = 20.0


def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 3))
    x[:, 0] = np.repeat([0.0, 1.0], SIZES)  # rows know their replica
    return x, rng.normal(size=(sum(SIZES), 1))


class Net(nn.Module):
    """Prints once, and raises or gives NaN in training where it is told to, on the replica whose rows are marked 1."""

    def __init__(self, trouble=None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
        self.trouble = trouble
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.trouble == "print" and self.calls == 1:
            print(f"replica {int(x[0, 0])} says hello")
        if self.training and self.calls == 2 and x[0, 0] == 1:
            if self.trouble == "raise":
                return self.explode()
            if self.trouble == "nan":
                return self.layers(x) * math.nan
        return self.layers(x)

    def explode(self):
        raise LookupError("the mark came up")


def program(trouble=None, dropout=0.0, optimizer=None):
    optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.9)
    model, buffers = Net(trouble, dropout), {"calls": "local"}
    return Program(model=model, loss=nn.MSELoss(), optimizer=optimizer, buffers=buffers)


def opened(world, own, **options):
    x, y = table()
    settings = {"epochs": 4, "batch_size": 32, "sync_every": 1, "retry_backoff_s": 0.01, **options}
    return world.fit(own, deal(x, y, SIZES), schema_of(x, y), **settings)


def assert_idle(world):
    deadline = time.monotonic() + IDLE_S
    while world.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert world.running() == []


_UNDISTURBED = {}


def undisturbed(world, own, **options):
    """As `trained`; the same run of the same kind of world is not repeated for another test."""
    key = type(world), own, tuple(options.items())
    if key not in _UNDISTURBED:
        _UNDISTURBED[key] = trained(world, own(), **options)
    return _UNDISTURBED[key]


def with_dropout():
    return program(dropout=0.4, optimizer=partial(AdamW, lr=0.01))


def trained(world, own, **options):
    with opened(world, own, **options) as fit:
        records = list(fit.rounds())
        fit.load_result()
    assert_idle(world)
    return flat(fit.program.model), records


@pytest.mark.parametrize("rounds_per_stage", [1, "auto"])
def test_the_result_is_gradient_descent_on_all_rows(world, rounds_per_stage):
    expected = program().model
    optimizer = SGD(expected.parameters(), lr=0.1, momentum=0.9)
    x, y = map(torch.from_numpy, table())
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(expected(x), y).backward()
        optimizer.step()
    got, records = undisturbed(world, program, rounds_per_stage=rounds_per_stage)
    torch.testing.assert_close(got, flat(expected), rtol=0, atol=1e-12)
    assert (got - flat(program().model)).abs().max() > 0.01
    assert [part.rows for part in records[0].replicas] == SIZES


@pytest.mark.parametrize("rounds_per_stage", [1, 2])
def test_stages_change_not_a_bit_of_a_run_with_state(world, rounds_per_stage):
    options = {"batch_size": 4, "sync_every": 2, "epochs": 2}
    together, _ = undisturbed(world, with_dropout, **options)
    options["rounds_per_stage"] = rounds_per_stage
    apart, records = trained(world, with_dropout(), **options)
    assert torch.equal(together, apart)
    assert sum(r.stage_seconds > 0 for r in records) == -(-len(records) // rounds_per_stage)


def test_what_replicas_print_is_seen_on_the_driver(world, capfd):
    lines = []
    with opened(world, program("print"), on_log=lambda replica, line: lines.append(f"[{replica}] {line}")) as fit:
        list(fit.rounds())
    printed = world.printed(capfd, lines)
    assert "replica 0 says hello" in printed
    assert "replica 1 says hello" in printed


@pytest.mark.fault(rows=[1, 2], phases="TR")
def test_the_users_traceback_reaches_the_driver_with_the_replicas_number(world):
    with opened(world, program("raise")) as fit, pytest.raises(UserCodeError) as caught:
        list(fit.rounds())
    assert str(caught.value).startswith("Traceback (most recent call last)")
    assert "LookupError: the mark came up" in str(caught.value)
    assert "in explode" in caught.value.traceback_text
    assert caught.value.replica == 1
    assert caught.value.host
    assert fit.state.committed == 1
    assert_idle(world)


@pytest.mark.fault(rows=[19], phases="AV")
def test_a_loss_that_is_not_finite_names_its_round_and_replica(world):
    with opened(world, program("nan")) as fit, pytest.raises(NonFiniteError) as caught:
        list(fit.rounds())
    assert (caught.value.round, caught.value.replica) == (2, 1)
    assert torch.isfinite(fit.state.parameters).all()
    assert_idle(world)


def test_a_fit_that_is_abandoned_leaves_nothing_running(world):
    with opened(world, program(), epochs=50) as fit:
        rounds = fit.rounds()
        next(rounds)
        assert world.running()
        rounds.close()
    assert_idle(world)


def test_a_stage_closed_between_rounds_gives_its_slots_back_and_the_run_goes_on(world):
    expected, _ = undisturbed(world, program, rounds_per_stage="auto")
    with opened(world, program()) as fit:
        rounds = fit.rounds()
        next(rounds)
        fit.close_stage()
        assert_idle(world)
        assert [record.round for record in rounds] == [2, 3, 4]
        fit.load_result()
    assert torch.equal(flat(fit.program.model), expected)
