"""A round a job, on the in-process twin: the same bits as over sockets, and every failure by name."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, facts_of, flat, local_coordinator, make_fit_on, schema_of, write_shards

from sparkdeep.errors import (
    NonFiniteError,
    ProtocolError,
    ReplicaLostError,
    ShardLostError,
    ShardMismatchError,
    UserCodeError,
    VersionMismatchError,
)
from sparkdeep.models.program import Program
from sparkdeep.optim.drift import FedProx, Scaffold
from sparkdeep.optim.local_work import Epochs, PostLocal
from sparkdeep.protocol.exchange import Exchange
from sparkdeep.protocol.orders import Inline, Reply, Stored, digest_of
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import EarlyStopping, LocalSettings, RunSettings
from sparkdeep.stages.jobs import JobStages
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.store import run_folder
from sparkdeep.testing.in_process import InProcessRunner

SIZES = [9, 14, 7]


class Net(nn.Module):
    """Batch norm, dropout and a frozen layer: buffers, random streams and parameters that do not travel."""

    def __init__(self, trouble=None, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        frozen = nn.Linear(3, 6).requires_grad_(False)
        self.layers = nn.Sequential(frozen, nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)).to(dtype)
        self.trouble = trouble

    def forward(self, x):
        marked = bool((x[:, 0] > 100).any())
        if self.training and marked and self.trouble == "raise":
            raise LookupError("the mark came up")
        if self.training and marked and self.trouble == "nan":
            return self.layers(x) * math.nan
        return self.layers(x)


def table(dtype=np.float32, mark=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 3)).astype(dtype)
    if mark:
        x[SIZES[0] : SIZES[0] + SIZES[1], 0] = 1000  # replica 1
    return x, rng.normal(size=(sum(SIZES), 1)).astype(dtype)


def program(trouble=None, optimizer=None, dtype=torch.float32):
    optimizer = optimizer or partial(AdamW, lr=0.01)
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    return Program(
        model=Net(trouble, dtype),
        loss=nn.MSELoss(),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        metrics={"off": lambda output, label: (output - label).abs().mean()},
    )


class Rig:
    """Shards once, and fits over either transport on them."""

    def __init__(self, tmp_path, *, dtype=np.float32, mark=False, sizes=SIZES):
        self.tmp_path = tmp_path
        x, y = table(dtype, mark)
        validation = [{"features": x[i : i + 4], "label": y[i : i + 4]} for i in (0, 10, 20)]
        self.schema = schema_of(x, y)
        self.paths = write_shards(tmp_path / "shards", deal(x, y, sizes), self.schema, validation)

    def sockets(self, own, **options):
        coordinator = local_coordinator()
        try:
            fit = make_fit_on(self.tmp_path, own, self.paths, self.schema, coordinator=coordinator, **options)
            records = list(fit.rounds())
            fit.load_result()
        finally:
            coordinator.close()
        return fit, records

    def jobs(self, own, *, exchange=None, wrap=None, **options):
        fit = self.fit(own, exchange=exchange, wrap=wrap, **options)
        records = list(fit.rounds())
        fit.load_result()
        return fit, records

    def fit(self, own, *, exchange=None, wrap=None, **options):
        local = LocalSettings(**_taken(LocalSettings, options))
        settings = RunSettings(num_workers=len(self.paths), **{"retry_backoff_s": 0.01, **_taken(RunSettings, options)})
        run = new_run_id()
        runner = InProcessRunner(
            local,
            self.paths,
            self.tmp_path / f"state-{run}",
            run=run,
            exchange=None if exchange is None else str(exchange),
        )
        return Fit(
            program=own,
            local=local,
            settings=settings,
            plan=plan_of(own, local, self.schema),
            shards=facts_of(self.paths),
            run=run,
            stages=JobStages(runner=wrap(runner) if wrap else runner),
            **options,
        )


def _taken(kind, options):
    names = {f.name for f in dataclasses.fields(kind)}
    return {name: options.pop(name) for name in list(options) if name in names}


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path)


OPTIONS = {"epochs": 3, "batch_size": 4, "sync_every": 2}


def assert_same(one, other):
    (fit, records), (fit2, records2) = one, other
    assert torch.equal(flat(fit.program.model), flat(fit2.program.model))
    for (name, a), (_, b) in zip(fit.program.model.named_buffers(), fit2.program.model.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert [(r.round, r.rows, r.loss, r.metrics) for r in records] == [
        (r.round, r.rows, r.loss, r.metrics) for r in records2
    ]


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inner_state": "average"},
        {"inner_state": "reset"},
        {"outer_optimizer": partial(SGD, lr=0.7, momentum=0.9, nesterov=True)},
        {"early_stopping": EarlyStopping(patience=1), "validate_every": 1, "epochs": 12},
        {"replica_state": "durable", "checkpoint_every": 2},
        {"codec": "int8", "error_feedback": True},
    ],
    ids=["keep", "average", "reset", "outer", "early", "durable", "int8"],
)
def test_not_a_bit_differs_from_sockets(rig, exchanged, options, tmp_path):
    settings = {**OPTIONS, **options}
    over_sockets = rig.sockets(program(), **settings)
    by_jobs = rig.jobs(program(), exchange=tmp_path / "exchange" if exchanged else None, **settings)
    assert_same(over_sockets, by_jobs)
    # Negative control: another seed gives other bits.
    other = rig.jobs(program(), **{**settings, "seed": 1})
    assert not torch.equal(flat(other[0].program.model), flat(by_jobs[0].program.model))


@pytest.mark.parametrize(
    "options", [{"schedule": PostLocal(3), "drift_correction": FedProx(0.5)}, {"schedule": Epochs(2)}]
)
def test_rules_and_drift_corrections_are_those_of_sockets(rig, options):
    settings = {**OPTIONS, **options}
    assert_same(rig.sockets(program(), **settings), rig.jobs(program(), **settings))


def test_control_variates_travel_alike_by_jobs_and_through_storage(rig, tmp_path):
    settings = {**OPTIONS, "drift_correction": Scaffold()}
    fits = [rig.sockets(program(optimizer=partial(SGD, lr=0.05)), **settings)]
    for exchange in (None, tmp_path / "exchange"):
        fits.append(rig.jobs(program(optimizer=partial(SGD, lr=0.05)), exchange=exchange, **settings))
        assert_same(fits[0], fits[-1])


def test_float64_parameters_keep_all_their_bits(tmp_path):
    rig = Rig(tmp_path, dtype=np.float64)
    over_sockets = rig.sockets(program(dtype=torch.float64), **OPTIONS)
    assert_same(over_sockets, rig.jobs(program(dtype=torch.float64), **OPTIONS))
    assert_same(over_sockets, rig.jobs(program(dtype=torch.float64), exchange=tmp_path / "exchange", **OPTIONS))


def test_a_replica_out_of_rows_weighs_nothing(tmp_path):
    rig = Rig(tmp_path, sizes=[1, 2, 27])
    options = {**OPTIONS, "sync_every": 1}
    over_sockets = rig.sockets(program(), **options)
    assert_same(over_sockets, rig.jobs(program(), **options))
    assert_same(over_sockets, rig.jobs(program(), exchange=tmp_path / "exchange", **options))


def test_the_mean_in_the_exchange_is_where_the_next_round_starts(rig, tmp_path):
    fit, records = rig.jobs(program(), exchange=tmp_path / "exchange", **OPTIONS)
    assert len(records) > 3
    assert fit.stages.runner.shipped == ["start", "program", "fixed"]  # the rest was there already
    fit, _ = rig.jobs(program(), exchange=tmp_path / "other", outer_optimizer=partial(SGD, lr=0.5), **OPTIONS)
    assert sorted(fit.stages.runner.shipped) == ["fixed", "program"] + ["start"] * (
        len(records) + 1
    )  # and once to validate the last


def test_the_exchange_holds_no_more_than_two_jobs(rig, tmp_path):
    fit, _ = rig.jobs(program(), exchange=tmp_path / "exchange", **OPTIONS)
    jobs = [p for p in (tmp_path / "exchange" / run_folder(fit.run)).iterdir() if p.is_dir()]
    assert len(jobs) <= 2


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.fault(rows=[1], phases="TR")
def test_the_users_exception_is_raised_with_its_traceback(tmp_path, exchanged):
    rig = Rig(tmp_path, mark=True)
    with pytest.raises(UserCodeError, match=r"^Traceback") as caught:
        rig.jobs(program("raise"), exchange=tmp_path / "exchange" if exchanged else None, **OPTIONS)
    assert "LookupError: the mark came up" in str(caught.value)
    assert (caught.value.replica, bool(caught.value.host)) == (1, True)


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.fault(rows=[19], phases="AV")
def test_nan_never_enters_the_mean(tmp_path, exchanged):
    rig = Rig(tmp_path, mark=True)
    fit = rig.fit(program("nan"), exchange=tmp_path / "exchange" if exchanged else None, **OPTIONS)
    with pytest.raises(NonFiniteError) as caught:
        list(fit.rounds())
    assert (caught.value.round, caught.value.replica) == (1, 1)
    assert torch.isfinite(fit.state.parameters).all()


class Faulty:
    """Passes orders on; `fault(order, number)` may raise, or change the order or the replies."""

    def __init__(self, inner, before=None, after=None):
        self.inner, self.before, self.after = inner, before, after
        self.num_replicas, self.keeps_states = inner.num_replicas, inner.keeps_states
        self.orders, self.renewed = [], 0

    @property
    def exchange(self):
        return self.inner.exchange

    @property
    def shipped(self):
        return self.inner.shipped

    def ship(self, slot, data):
        return self.inner.ship(slot, data)

    def renew(self):
        self.renewed += 1

    def run(self, order, description, **timeouts):
        self.orders.append((order, description))
        if self.before:
            order = self.before(order, len(self.orders)) or order
        replies = self.inner.run(order, description, **timeouts)
        return self.after(replies, len(self.orders)) if self.after else replies


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("state", ["local", "durable"])
def test_a_round_whose_replies_are_lost_is_repeated_to_the_same_bits(rig, tmp_path, exchanged, state):
    options = {**OPTIONS, "replica_state": state, "checkpoint_every": 2}
    exchange = tmp_path / "exchange" if exchanged else None
    expected = rig.jobs(program(), exchange=exchange, **options)
    lost = []

    def after(replies, number):
        if number in (4, 5):  # the work is done, and its states are on disk
            lost.append(number)
            raise ReplicaLostError("the job's replies were lost")
        return replies

    fit, records = rig.jobs(program(), exchange=exchange, wrap=lambda runner: Faulty(runner, after=after), **options)
    assert lost == [4, 5]
    assert torch.equal(flat(fit.program.model), flat(expected[0].program.model))
    assert sum(record.retries for record in records) >= 1
    assert not any(record.state_reset for record in records)


def test_a_lost_state_is_named_in_the_record(rig, tmp_path):
    def before(order, number):
        if number == 3:
            for path in tmp_path.glob("state-*/1/*"):
                path.unlink()

    _, records = rig.jobs(program(), wrap=lambda runner: Faulty(runner, before=before), **OPTIONS)
    assert [record.state_reset for record in records[:4]] == [[], [], [1], []]


def test_a_lost_durable_state_sends_the_run_back_to_its_snapshot(rig, tmp_path):
    options = {**OPTIONS, "replica_state": "durable", "checkpoint_every": 2}
    expected, _ = rig.jobs(program(), **options)

    def before(order, number):
        if number == 5 and order.kind == "train":  # rounds 1 and 2, scores, states, round 3
            for path in tmp_path.glob("state-*/1/*"):
                path.unlink()

    fit, _ = rig.jobs(program(), wrap=lambda runner: Faulty(runner, before=before), **options)
    orders = [order for order, _ in fit.stages.runner.orders]
    assert [o.opening.state for o in orders if o.kind == "train"][:5] == ["fresh", "local", "local", "sent", "local"]
    assert torch.equal(flat(fit.program.model), flat(expected.program.model))


def test_a_run_goes_on_from_a_checkpoint_over_either_transport(rig, tmp_path):
    def checkpoints():
        return CheckpointDirectory(LocalStore(tmp_path / "checkpoints"), identity={"run": "x"}, keep=3)

    expected, _ = rig.jobs(program(), **OPTIONS)
    rounds = rig.fit(program(), checkpoints=checkpoints(), checkpoint_every=2, **OPTIONS).rounds()
    for _ in range(3):
        next(rounds)
    rounds.close()
    resumed, records = rig.sockets(program(), checkpoints=checkpoints(), checkpoint_every=2, **{**OPTIONS, "epochs": 2})
    assert records[0].round == 3  # over sockets, from what jobs left
    resumed, records = rig.jobs(program(), checkpoints=checkpoints(), checkpoint_every=2, **OPTIONS)
    assert records[0].round == 5  # and back
    assert torch.equal(flat(resumed.program.model), flat(expected.program.model))


def test_a_mean_that_is_gone_from_the_exchange_is_shipped_again(rig, tmp_path):
    expected, _ = rig.jobs(program(), **OPTIONS)

    def before(order, number):
        if number == 3:
            (tmp_path / "exchange" / order.start.names[0]).write_bytes(b"damaged")

    fit, records = rig.jobs(
        program(), exchange=tmp_path / "exchange", wrap=lambda runner: Faulty(runner, before=before), **OPTIONS
    )
    assert records[2].retries == 1
    assert fit.stages.runner.shipped == ["start", "program", "fixed", "start"]
    assert torch.equal(flat(fit.program.model), flat(expected.program.model))


def test_a_shard_that_is_gone_is_made_anew(rig):
    def before(order, number):
        if number == 2:
            raise ShardLostError("replica 0: its shard lies with another executor.")

    fit, _ = rig.jobs(program(), wrap=lambda runner: Faulty(runner, before=before), **OPTIONS)
    assert fit.stages.runner.renewed == 1


@pytest.mark.fault(rows=[30], phases="LD")
def test_other_rows_and_other_versions_are_refused(rig):
    def other_rows(order, number):
        facts = dataclasses.replace(order.facts[1], digest="0" * 32)
        return dataclasses.replace(order, facts=(order.facts[0], facts, order.facts[2]))

    with pytest.raises(ShardMismatchError, match="replica 1"):
        rig.jobs(program(), wrap=lambda runner: Faulty(runner, before=other_rows), **OPTIONS)
    with pytest.raises(VersionMismatchError, match=r"0\.0\.1"):
        rig.jobs(
            program(),
            wrap=lambda runner: Faulty(
                runner, before=lambda order, _: dataclasses.replace(order, versions={"torch": "0.0.1"})
            ),
            **OPTIONS,
        )


@pytest.mark.fault(rows=[18], phases="RT")
def test_replies_of_another_job_are_a_zombies(rig):
    def after(replies, number):
        zombie = Reply(header={**replies[0].header, "job": "earlier"}, bodies=replies[0].bodies)
        return [zombie, *replies[1:]]

    with pytest.raises(ProtocolError, match="replies"):
        rig.jobs(program(), wrap=lambda runner: Faulty(runner, after=after), **OPTIONS)


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.fault(rows=[21], phases="RT")
def test_a_damaged_update_voids_the_round(rig, tmp_path, exchanged, monkeypatch):
    expected, _ = rig.jobs(program(), **OPTIONS)
    hits = []

    def damage(data):
        hits.append(1)
        return bytes(data[:8]) + bytes([data[8] ^ 1]) + bytes(data[9:])

    def after(replies, number):
        if number == 2:
            return [Reply(header=r.header, bodies=(damage(r.body),)) if i == 1 else r for i, r in enumerate(replies)]
        return replies

    real = Exchange.body

    def body(self, replica, num_bytes):
        data = real(self, replica, num_bytes)
        return damage(data) if replica == 1 and not hits else data

    if exchanged:
        monkeypatch.setattr(Exchange, "body", body)
    wrap = None if exchanged else lambda runner: Faulty(runner, after=after)
    fit, records = rig.jobs(program(), exchange=tmp_path / "exchange" if exchanged else None, wrap=wrap, **OPTIONS)
    assert hits == [1]
    assert sum(record.retries for record in records) == 1
    assert torch.equal(flat(fit.program.model), flat(expected.program.model))


@pytest.mark.fault(rows=[12], phases="RT")
def test_an_update_that_never_comes_has_a_deadline(tmp_path):
    exchange = Exchange(str(tmp_path), "run", "job")
    with pytest.raises(ReplicaLostError, match="replica 0 did not appear"):
        exchange.headers(1, timeout_s=0.05, check=lambda: None)


def test_parcels_say_what_is_wrong_with_them(tmp_path):
    LocalStore(tmp_path).write("a/b", b"12345")
    good = Stored(folder=str(tmp_path), names=("a/b",), num_bytes=5, digest=digest_of(b"12345"))
    assert good.open() == b"12345"
    with pytest.raises(ReplicaLostError, match="checksum"):
        dataclasses.replace(good, digest=digest_of(b"12346")).open()
    with pytest.raises(ReplicaLostError, match="cannot be read"):
        dataclasses.replace(good, names=("a/c",)).open()
    with pytest.raises(ReplicaLostError, match="at most 4"):
        dataclasses.replace(good, num_bytes=4).open()
    assert Inline(data=b"1", digest=digest_of(b"1")).open() == b"1"


def test_jobs_say_what_they_are(rig):
    fit, _ = rig.jobs(program(), wrap=Faulty, **{**OPTIONS, "epochs": 1})
    said = [description for _, description in fit.stages.runner.orders]
    assert said[0] == "sparkdeep fit: rounds 1-1 of 2"
    assert said[-1] == "sparkdeep fit: validation after round 2 of 2"
