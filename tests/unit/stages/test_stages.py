"""A stage takes in only the replicas it expects, in time, and counts only updates that arrived whole."""

from __future__ import annotations

import dataclasses
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD
from twin import deal, flat, local_coordinator, make_fit, schema_of
from twin_faults import Plan, marked_table, raises

from sparkdeep.errors import ProtocolError, ReplicaLostError, ShardMismatchError, VersionMismatchError
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import Hello
from sparkdeep.replica import stage as replica_module
from sparkdeep.replica.link import LogStream, ReplicaLink
from sparkdeep.stages import stage as stage_module

SIZES = [12, 8]
X, Y = marked_table(SIZES)


@pytest.fixture
def fit_of(tmp_path):
    coordinator = local_coordinator()

    def made(plan=None, wrap=None, sizes=SIZES, **options):
        plan = plan or Plan()
        torch.manual_seed(0)
        program = Program(
            model=nn.Linear(4, 1), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.05), augment=plan.hook()
        )
        settings = {
            "epochs": 2,
            "batch_size": 4,
            "sync_every": 2,
            "retry_backoff_s": 0.001,
            "rounds_per_stage": 100,
            **options,
        }
        parts, schema = deal(X, Y, sizes), schema_of(X, Y)
        return make_fit(tmp_path, program, parts, schema, coordinator=coordinator, wrap=wrap or plan.wrap, **settings)

    yield made
    coordinator.close()
    deadline = time.monotonic() + 10.0  # a replica that sleeps holds the generators that other tests draw from
    while any(t.name.startswith("sparkdeep-replica") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def result(fit):
    records = list(fit.rounds())
    fit.load_result()
    return flat(fit.program.model), records


# -- who may take part --------------------------------------------------------------------------------------------------


@pytest.mark.fault(rows=[34], phases="PF")
def test_other_versions_on_the_executors_are_refused_in_a_table(fit_of, monkeypatch):
    plan = Plan()
    monkeypatch.setattr(replica_module, "versions", lambda: {"python": "3.9", "torch": "1.0", "sparkdeep": "0.0.1"})
    with pytest.raises(VersionMismatchError, match=r"(?s)driver: .*'torch': '1\.0'.*Install the driver's versions"):
        result(fit_of(plan))
    assert plan.launches == 1


@pytest.mark.fault(rows=[30], phases="LD")
def test_a_shard_of_other_rows_or_order_is_refused(fit_of):
    fit = fit_of()
    first, second = fit.state.generation.shards
    other = (first, dataclasses.replace(second, digest="0" * 32))
    fit.state.generation = dataclasses.replace(fit.state.generation, shards=other)
    with pytest.raises(ShardMismatchError, match=r"shard of replica 1 .*not deterministic.*Parquet"):
        result(fit)
    fit = fit_of()
    other = (dataclasses.replace(first, rows={"train": 11, "validation": 0}), second)
    fit.state.generation = dataclasses.replace(fit.state.generation, shards=other)
    with pytest.raises(ShardMismatchError, match="replica 0"):
        result(fit)


def test_a_replica_without_its_shard_has_the_shards_made_anew(fit_of, monkeypatch):
    expected, _ = result(fit_of())
    missing, renewed = ["the shard lies on another host"], []

    def hello(**fields):
        if fields["replica"] == 1 and missing:
            fields["shard"] = missing.pop()
        return Hello(**fields)

    monkeypatch.setattr(replica_module, "Hello", hello)
    plan = Plan()
    fit = fit_of(plan)
    monkeypatch.setattr(fit.stages.launcher, "renew", lambda: renewed.append(plan.launches))
    got, records = result(fit)
    assert renewed == [1], "once, and before the second launch"
    assert torch.equal(got, expected)
    assert records[0].retries == 1


class Nobody:
    """A launcher whose replicas never come."""

    num_replicas = 2

    def __init__(self, problem=None):
        self.problem = problem
        self.cancelled = 0

    def launch(self, ticket, description):
        self.description = description
        return self

    def renew(self):
        raise AssertionError("no shard is missing")

    def failure(self):
        return self.problem

    def finish(self, timeout_s):
        raise AssertionError("nothing was opened")

    def cancel(self):
        self.cancelled += 1

    def slots(self):
        return None


def test_replicas_that_do_not_come_in_time_are_named_and_cancelled(fit_of):
    nobody = Nobody()
    began = time.monotonic()
    with pytest.raises(
        ReplicaLostError, match=r"replicas \[0, 1\] of 2 did not come within open_timeout_s=0\.3 s.*slots"
    ):
        result(fit_of(wrap=lambda _: nobody, open_timeout_s=0.3, max_retries=0))
    assert time.monotonic() - began < 30.0
    assert nobody.cancelled >= 1
    assert "rounds 1-4 of 4" in nobody.description


def test_slots_that_go_away_while_a_stage_waits_are_noticed_long_before_its_deadline(fit_of, monkeypatch):
    monkeypatch.setattr(stage_module, "_ASK_EVERY_S", 0.05)
    monkeypatch.setattr(stage_module, "_SHORT_S", 0.2)
    nobody, told = Nobody(), [2]
    nobody.slots = lambda: told.pop() if told else 1
    began = time.monotonic()
    with pytest.raises(ReplicaLostError, match="slots went away while the stage waited"):
        result(fit_of(wrap=lambda _: nobody, max_retries=0))
    assert time.monotonic() - began < 30.0
    assert nobody.cancelled >= 1


def test_a_launch_that_fails_says_why_without_waiting(fit_of):
    nobody = Nobody(RuntimeError("no executor has two cores"))
    began = time.monotonic()
    with pytest.raises(ReplicaLostError, match="the stage failed: RuntimeError: no executor has two cores"):
        result(fit_of(wrap=lambda _: nobody, max_retries=0))
    assert time.monotonic() - began < 30.0


# -- updates ----------------------------------------------------------------------------------------------------------


def tampered(monkeypatch, change):
    """The first update of round 2 that has a body is changed on its way, once."""
    send, seen = ReplicaLink.update, []

    def update(self, outcome, **how):
        if outcome.update.round == 2 and outcome.update.weight and not seen:
            seen.append(1)
            outcome = change(outcome)
        send(self, outcome, **how)

    monkeypatch.setattr(ReplicaLink, "update", update)


class Flipped:
    """A result whose first byte changes after it was hashed."""

    def __init__(self, outcome):
        self._outcome = outcome

    def __getattr__(self, name):
        return getattr(self._outcome, name)

    def body(self, **how):
        for i, piece in enumerate(self._outcome.body(**how)):
            yield bytes([piece[0] ^ 1]) + bytes(piece[1:]) if i == 0 else piece


def with_header(**changes):
    return lambda outcome: dataclasses.replace(outcome, update=dataclasses.replace(outcome.update, **changes))


@pytest.mark.fault(rows=[21], phases="RT")
def test_an_update_damaged_on_its_way_voids_the_round_which_is_repeated(fit_of, monkeypatch):
    expected, _ = result(fit_of())
    tampered(monkeypatch, lambda outcome: Flipped(outcome))
    plan = Plan()
    got, records = result(fit_of(plan))
    assert plan.launches == 2
    assert sum(record.retries for record in records) == 1
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_header(round=9), "sent an update of round 9 in round 2"),
        (with_header(weight=float("inf")), "sent an update of weight inf"),
        (with_header(weight=-1.0), "sent an update of weight -1"),
        (with_header(rows=-1), "rows -1"),
        (with_header(sections=["a"] * 9), "sent an update of weight"),
        (with_header(sections=["a"]), "average different optimizer states|announced a body"),
        (with_header(buffer_bytes=1 << 40), "announced a body of"),
        (lambda outcome: dataclasses.replace(outcome, vector=outcome.vector[:-1]), "announced a body of"),
    ],
    ids=["round", "inf", "negative", "rows", "nine sections", "a section", "buffers", "short"],
)
@pytest.mark.fault(rows=[20], phases="AV")
def test_an_update_that_makes_no_sense_ends_the_fit_and_is_not_counted(fit_of, monkeypatch, change, complaint):
    tampered(monkeypatch, change)
    fit = fit_of()
    with pytest.raises(ProtocolError, match=complaint):
        list(fit.rounds())
    assert fit.state.committed == 1


@pytest.mark.fault(rows=[10], phases="TR")
def test_a_replica_that_says_nothing_for_too_long_counts_as_lost(fit_of):
    expected, _ = result(fit_of())
    plan = Plan({(0, 2): lambda _features: plan.until_relaunched() and None})
    got, records = result(fit_of(plan, stall_timeout_s=0.5, max_retries=10))
    assert plan.launches >= 2
    assert records[1].retries >= 1
    assert torch.equal(got, expected)


@pytest.mark.fault(rows=[11], phases="TR")
def test_a_replica_that_makes_progress_is_not_lost_however_long_the_round_is(fit_of):
    slow = {(0, batch): lambda _features: time.sleep(0.55) for batch in range(8)}
    plan, beats = Plan(slow), []
    fit = fit_of(plan, sizes=[32], sync_every="epoch", epochs=1, stall_timeout_s=3.5, max_retries=0)
    fit.on_beat = lambda replica, rows: beats.append((replica, rows))
    result(fit)
    assert plan.launches == 1
    assert beats
    assert all(0 < rows <= 32 for _, rows in beats)


def test_the_error_of_a_replica_in_trouble_is_kept_while_others_work(fit_of):
    plan = Plan({(1, 0): raises(ZeroDivisionError("mine")), (0, 0): lambda _features: time.sleep(0.3)})
    with pytest.raises(Exception, match="ZeroDivisionError: mine") as caught:
        result(fit_of(plan))
    assert caught.value.replica == 1


# -- the replica's end ----------------------------------------------------------------------------------------------------


def test_a_log_stream_sends_whole_lines():
    sent = []

    class Recorder:
        def send(self, kind, header):
            sent.append((kind, header["text"]))

    stream = LogStream(Recorder())
    print("one", file=stream)
    stream.write("half")
    assert sent == [("log", "one")]
    stream.write(" done\nnext\n")
    print("x" * 10_000, file=stream)
    assert sent[1:3] == [("log", "half done"), ("log", "next")]
    assert len(sent[3][1]) == 8192
    threads = [threading.Thread(target=lambda i=i: stream.write(f"{i}" * 5 + "\n")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text for _, text in sent[4:]) == [f"{i}" * 5 for i in range(8)]
