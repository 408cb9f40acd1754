"""A conversation by letter: what stands for the connection where a job gives one order."""

from __future__ import annotations

import dataclasses

import pytest

from sparkdeep.data.schema import Schema
from sparkdeep.errors import ProtocolError, ReplicaLostError, ShardLostError, ShardMismatchError, VersionMismatchError
from sparkdeep.protocol.messages import Hello, Open, RoundSpec, ShardFacts, to_header
from sparkdeep.protocol.orders import Inline, Job, Order, digest_of
from sparkdeep.replica.job import Letter
from sparkdeep.replica.link import LogStream, ReplicaLink
from sparkdeep.settings.run import LocalSettings

HELLO = Hello(
    run="run",
    stage="job",
    replica=0,
    host="h",
    pid=1,
    device="cpu",
    versions={"python": "3"},
    rows={"train": 4},
    digest="d",
    shard="",
)
ORDER = Order(spec=RoundSpec(round=3, epoch=0, first_step=0, num_steps=2), sections=["momentum"], buffer_bytes=2)


def parcel(data):
    return Inline(data=data, digest=digest_of(data))


def job(**changes):
    opening = Open(committed=2, scheduler_steps=4, state="sent", kept_round=2, kept_by="", tensor_bytes=0, keep=True)
    parts = {"run": "run", "name": "job", "kind": "train", "order": ORDER, "opening": opening}
    parts |= {"settings": LocalSettings(), "schema": Schema(fields=()), "versions": {"python": "3"}, "durable": False}
    parts |= {"facts": (ShardFacts(rows={"train": 4}, digest="d"),), "body": parcel(b"12345")}
    return Job(**{**parts, **changes})


def test_the_driver_says_open_then_the_order_then_stop():
    link = ReplicaLink(Letter(job(fixed=parcel(b"fixed"), states=(parcel(b"state"),))))
    answer, fixed, state = link.introduce(HELLO)
    assert (answer.tensor_bytes, fixed, state) == (5, b"fixed", b"state")
    frame = link.command()
    assert (frame.kind, frame.body_bytes) == ("train", 5)
    assert Order.of(frame.header) == ORDER
    assert link.read_bytes(2) + link.read_bytes(3) == b"12345"
    with pytest.raises(ProtocolError, match="ends after 0 of 1 bytes"):
        link.read_bytes(1)
    assert link.command().kind == "stop"


def test_what_the_replica_says_is_kept_and_signs_of_life_begin_once_it_stands():
    beats = []
    letter = Letter(job(), lambda: beats.append(1))
    link = ReplicaLink(letter)
    link.introduce(HELLO)
    assert not beats, "it is not built yet, which may take longer than a batch"
    link.opened("restored")
    link.beat(1, 1)
    assert len(beats) == 2
    link.send("scores", {}, b"a", b"bc")
    link.send("bye")
    assert letter.said["opened"] == {"state": "restored"}
    assert letter.bodies == (b"a", b"bc")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"shard": "it is gone"}, ShardLostError),
        ({"digest": "other"}, ShardMismatchError),
        ({"versions": {"python": "2"}}, VersionMismatchError),
    ],
    ids=["shard", "rows", "versions"],
)
def test_another_replica_than_was_meant_is_refused_before_it_is_built(changes, error):
    with pytest.raises(error):
        ReplicaLink(Letter(job())).introduce(dataclasses.replace(HELLO, **changes))


def test_a_durable_state_that_is_gone_voids_the_job():
    for durable in (False, True):
        link = ReplicaLink(Letter(job(durable=durable)))
        link.introduce(HELLO)
        if not durable:
            link.opened("reset")
            continue
        with pytest.raises(ReplicaLostError, match=r"state of replica 0 after round 2 is gone.*last durable snapshot"):
            link.opened("reset")


def test_the_first_lines_that_it_prints_are_kept_the_last_one_too_if_it_has_no_end():
    letter = Letter(job())
    stream = LogStream(letter)
    print("one\ntwo\nhal", end="", file=stream)
    assert letter.lines == ["one", "two"]
    stream.end()
    stream.end()
    assert letter.lines == ["one", "two", "hal"]
    for number in range(600):
        print(f"{number:04d}" * 1000, file=stream)
    assert len(letter.lines) == 500
    assert len(letter.lines[-1]) == 2000
    assert not letter.said


def test_an_order_that_is_none_is_refused():
    header = to_header(ORDER)
    assert Order.of(header) == ORDER
    for changes in (
        {"spec": {**header["spec"], "num_steps": 0}},
        {"spec": {**header["spec"], "epoch": -1}},
        {"ahead": {"round": 1}},
        {"parameters": "some"},
        {"sections": [str(i) for i in range(9)]},
        {"other": 1},
    ):
        with pytest.raises(ProtocolError):
            Order.of({**header, **changes})
    with pytest.raises(ProtocolError):
        Order.of({name: value for name, value in header.items() if name != "clock"})
