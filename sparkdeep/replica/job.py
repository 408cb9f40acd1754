"""A replica's life in one job: it is built, takes its state and the parameters, does one order and keeps its state."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparkdeep.data.shards import Shard
from sparkdeep.errors import (
    CheckpointError,
    NonFiniteError,
    ReplicaLostError,
    ShardLostError,
    SparkdeepError,
    UserCodeError,
)
from sparkdeep.models.program import Program, unpack_program
from sparkdeep.optim.combining import check_updates, combine
from sparkdeep.protocol.exchange import Exchange
from sparkdeep.protocol.messages import Hello, Saved, Update, to_header
from sparkdeep.protocol.orders import Order, Reply, unpack_globals
from sparkdeep.protocol.refusals import check_shard, check_versions
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.update import LocalResult
from sparkdeep.storage.state_files import StateFiles, own_files
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, Codec, codec_named, encoded_bytes
from sparkdeep.tensors.parameters import Layout, fill, raw_bytes
from sparkdeep.tensors.state_dicts import pack, pack_tensors, unpack_tensors
from sparkdeep.versions import versions

__all__ = ["Place", "obey"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica is, and how it is watched."""

    replica: int
    host: str
    device: str
    shard: Path
    problem: str
    """"" or why the shard cannot be used here."""
    state_dir: Path
    beat: Callable[[], None]
    """Called whenever something got further: what watches over the replica starts its clock anew."""
    check: Callable[[], None] = lambda: None
    """Called while it waits for others; raises to give up."""
    open_program: Callable[[bytes], Program] = unpack_program
    keeps_state: bool = True
    """Whether the state after a round is kept in `state_dir`."""


def obey(order: Order, place: Place) -> Reply:
    """Do what the order says.

    Raises:
        UserCodeError: the user's model, loss or callable raised.
        ReplicaLostError: the environment failed; the order can be repeated.
        ShardLostError, ShardMismatchError, VersionMismatchError: this is not the replica that was meant.
    """
    if place.problem:
        raise ShardLostError(
            f"replica {place.replica} on {place.host}: {place.problem}", replica=place.replica, host=place.host
        )
    with own_files("it opened the shard"):
        shard = Shard.open(place.shard)
    with contextlib.closing(shard):
        hello = _hello(order, place, shard)
        check_versions(order.versions, [hello])
        check_shard(hello, order.facts[place.replica])
        header: dict[str, Any] = {"job": order.job, "replica": place.replica, "hello": asdict(hello)}
        states = StateFiles(place.state_dir, order.job)
        if order.kind == "states":
            with own_files("it read the replica's state"):
                return Reply(header=header, bodies=(states.read(order.committed, order.kept_by),))
        with _named(place, "building the model and optimizer"):
            replica = _build(order, place, shard)
        header["state"] = _restore(replica, order, place, states)
        place.beat()
        if order.kind == "evaluate":
            with _named(place, "command 'evaluate'"):
                return Reply(header=header, bodies=(pack(replica.evaluate()),))
        return _train(replica, order, place, states, header)


def _hello(order: Order, place: Place, shard: Shard) -> Hello:
    return Hello(
        run=order.run,
        stage=order.job,
        replica=place.replica,
        host=place.host,
        pid=os.getpid(),
        device=place.device,
        versions=versions(),
        rows=shard.info.rows,
        digest=shard.info.digest,
        shard="",
    )


def _build(order: Order, place: Place, shard: Shard) -> Replica:
    assert order.program is not None
    replica = Replica(
        place.open_program(bytes(order.program.open())),
        order.settings,
        order.schema,
        shard,
        number=place.replica,
        device=torch.device(place.device),
        beat=lambda _rows, _steps: place.beat(),
    )
    if order.fixed is not None:
        fill(replica.model, unpack_tensors(bytes(order.fixed.open())))
    return replica


def _restore(replica: Replica, order: Order, place: Place, states: StateFiles) -> str:
    """Put parameters and state where the driver wants them; says what came of the state."""
    assert order.start is not None
    parameters, inner, buffers = unpack_globals(order.start.open(), replica.layout, order.sections)
    replica.exchange.known.copy_(parameters)
    replica.begin_round(pack_tensors(buffers))
    outcome = "fresh"
    if order.source == "sent":
        replica.load_state(bytes(order.states[place.replica].open()))
        outcome = "restored"
    elif order.source == "local":
        # Damaged or gone: reported as "reset", and the driver names the loss in the round's record.
        with contextlib.suppress(CheckpointError, OSError):
            replica.load_state(states.read(order.committed, order.kept_by))
            outcome = "restored"
    if outcome == "fresh":
        if order.source == "local" and order.durable:
            raise ReplicaLostError(
                f"the state of replica {place.replica} after round {order.committed} is gone with its executor; going "
                "back to the last durable snapshot.",
                replica=place.replica,
                host=place.host,
            )
        replica.restart(order.scheduler_steps)
        outcome = "reset" if order.source == "local" else "fresh"
    replica.load_inner_state(list(order.sections), inner)
    return outcome


def _train(replica: Replica, order: Order, place: Place, states: StateFiles, header: dict[str, Any]) -> Reply:
    assert order.spec is not None
    with _named(place, "command 'train'"):
        result = replica.train(order.spec).encoded()  # what the code loses belongs to the state that is kept
    place.beat()
    saved = Saved(bytes=0, seconds=0.0)
    if result.update.finite and place.keeps_state:
        began = time.perf_counter()
        data = replica.save_state()
        with own_files("it kept the replica's state"):
            states.write(order.spec.round, data)
        saved = Saved(bytes=len(data), seconds=time.perf_counter() - began)
    header |= {"update": to_header(result.update), "saved": to_header(saved)}
    if order.exchange is None:
        return Reply(header=header, bodies=tuple(result.body()))
    return _exchanged(replica.layout, order, place, header, result)


def _exchanged(layout: Layout, order: Order, place: Place, header: dict[str, Any], result: LocalResult) -> Reply:
    """Lay the update down; the first replica gives the mean of all as its body."""
    assert order.exchange is not None
    assert order.spec is not None
    exchange = Exchange(order.exchange, order.run, order.job)
    exchange.put(place.replica, place.host, result.update, b"".join(result.body()))
    if place.replica != 0:
        return Reply(header=header)

    def watch() -> None:
        place.beat()
        place.check()

    updates, hosts = exchange.headers(len(order.facts), timeout_s=order.timeout_s, check=watch)
    try:
        check_updates(updates, hosts, order.spec.round)
    except NonFiniteError:
        return Reply(header=header)  # the driver sees the same headers, and refuses the round by name
    codec = codec_named(order.settings.codec)
    mean = combine(
        updates,
        lambda replica: exchange.body(replica, _body_bytes(updates[replica], layout, codec)),
        layout,
        codec,
        result.exchange.known if codec.lossy else None,
    )
    if mean is None:
        return Reply(header=header)
    place.beat()
    narrow = mean.vector.to(layout.dtype)
    buffers = pack_tensors(mean.buffers)
    stored = exchange.put_mean(b"".join([raw_bytes(narrow), buffers]))
    exchange.sweep(order.stale)
    header["mean"] = {**asdict(stored), "sections": mean.sections, "buffer_bytes": len(buffers)}
    return Reply(header=header, bodies=(raw_bytes(mean.vector if order.wide else narrow), buffers))


def _body_bytes(update: Update, layout: Layout, codec: Codec) -> int:
    numel = (1 + len(update.sections)) * layout.numel
    return encoded_bytes(codec, numel, layout.dtype) + update.buffer_bytes + CHECKSUM_BYTES


@contextmanager
def _named(place: Place, where: str) -> Iterator[None]:
    """What the user's code raises travels with its traceback, the replica and the host."""
    try:
        yield
    except SparkdeepError:
        raise
    except Exception as error:
        text = "".join(traceback.format_exception(error))[-65536:]
        who = f"replica {place.replica} on {place.host} (process {os.getpid()})"
        raise UserCodeError(
            f"{text.rstrip()}\n\n{type(error).__name__}: {error}\n(raised on {who}, in {where}; not retried)",
            replica=place.replica,
            host=place.host,
            traceback_text=text,
        ) from error
