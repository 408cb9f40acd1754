"""A replica's life in one stage: hello, rounds as the driver asks for them, farewell."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from sparkdeep import seams
from sparkdeep.data.shards import Shard
from sparkdeep.errors import CheckpointError, ProtocolError, ReplicaLostError, SparkdeepError, UserCodeError
from sparkdeep.models.packing import unpack_program
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import Failure, Hello, Open, ReplicaPlan, field
from sparkdeep.protocol.orders import Order
from sparkdeep.protocol.wire import ConnectionLostError, Frame
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.round import ReplicaRounds, keep_state
from sparkdeep.storage.disks import StateFiles, own_files
from sparkdeep.tensors.state_dicts import pack
from sparkdeep.versions import versions

__all__ = ["Place", "live", "serve"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica is."""

    replica: int
    host: str
    device: str
    shard: Path
    problem: str = ""
    """"" or why the shard cannot be used here."""
    state_dir: Path


def live(
    link: ReplicaLink,
    place: Place,
    *,
    run: str,
    stage: str,
    plan: Callable[[], ReplicaPlan],
    open_program: Callable[[bytes], Program] = unpack_program,
) -> Replica | None:
    """Say hello, and answer the driver until it says stop; see `serve` for what is raised.

    Args:
        link: to the driver.
        place: where the replica is.
        run: which it belongs to.
        stage: likewise.
        plan: what it is made from; asked for when the driver has let it in.
        open_program: makes the user's objects.
    """
    with ExitStack() as stack:
        shard = None
        if not place.problem:
            with own_files("it opened the shard"):
                shard = stack.enter_context(closing(Shard.open(place.shard)))
        hello = Hello(
            run=run,
            stage=stage,
            replica=place.replica,
            host=place.host,
            pid=os.getpid(),
            device=place.device,
            versions=versions(),
            rows=shard.info.rows if shard else {},
            digest=shard.info.digest if shard else "",
            shard=place.problem,
        )
        if shard is None:
            link.introduce(hello)  # the driver refuses it, and makes new shards where replicas run
            return None
        own = shard

        def build() -> Replica:
            parts = plan()
            program, device = open_program(parts.program), torch.device(place.device)
            number = place.replica
            return Replica(program, parts.settings, parts.schema, own, number=number, device=device, beat=link.beat)

        return serve(link, hello, build, StateFiles(place.state_dir, stage))


def serve(link: ReplicaLink, hello: Hello, build: Callable[[], Replica], states: StateFiles) -> Replica:
    """Answer the driver until it says stop; returns the replica as it is then.

    A failure of the user's code, or of ours, is reported with its traceback before it is raised.

    Raises:
        ConnectionLostError: the driver is gone; nothing is left to do.
    """
    where = "introduction"
    try:
        answer, tensors, sent = link.introduce(hello)
        where = "building the model and optimizer"
        replica = build()
        seams.reach("load", round_number=answer.committed + 1, replica=hello.replica)
        replica.load_tensors(tensors)
        link.opened(_restore(replica, answer, sent, states))
        rounds = ReplicaRounds(link, replica, states, keep=answer.keep)
        frame: Frame | None = None
        while True:
            frame = frame or link.command()
            where = f"command {frame.kind!r}"
            if frame.kind == "stop":
                if frame.header.get("save") is not None:
                    replica.catch_up(field(frame.header, "clock", int))
                    keep_state(states, field(frame.header, "save", int), replica.save_state())
                link.send("bye")
                return replica
            if frame.kind == "train":
                frame = rounds.run(frame)
                continue
            _obey(link, replica, rounds, frame)
            frame = None
    except (ConnectionLostError, ProtocolError):
        raise
    except Exception as error:
        link.fail(
            Failure(
                cause=_cause(error),
                message=f"{type(error).__name__}: {error}"[:8192],
                traceback="".join(traceback.format_exception(error))[-65536:],
                where=where,
            )
        )
        raise


def _cause(error: Exception) -> str:
    if isinstance(error, ReplicaLostError):
        return "lost"
    return "ours" if isinstance(error, SparkdeepError) and not isinstance(error, UserCodeError) else "user"


def _obey(link: ReplicaLink, replica: Replica, rounds: ReplicaRounds, frame: Frame) -> None:
    kind, header = frame.kind, frame.header
    if kind == "evaluate":
        order = Order.of(header)
        # What the next round starts from may not be overwritten where it is not sent whole.
        follows = replica.exchange.overlap or replica.exchange.down.lossy
        parameters = replica.layout.empty() if follows else replica.exchange.known
        link.read_vector(parameters)
        link.read_vector(replica.layout.empty(len(order.sections)))  # averaged optimizer state scores nothing
        replica.load_for_scoring(parameters, link.read_bytes(order.buffer_bytes))
        link.send("scores", {}, pack(replica.evaluate()))
    elif kind == "undo":
        rounds.go_back(field(header, "round", int))
    elif kind == "state":
        replica.catch_up(Order.of(header).clock)
        link.send("state", {}, replica.save_state())
    elif kind == "probe":
        link.send("probed", {}, link.read_bytes(frame.body_bytes))
    elif kind == "trial":
        rounds.try_ring(field(header, "numel", int))
        link.send("tried")
    elif kind == "ring":
        rounds.join_ring(field(header, "size", int), field(header, "timeout_s", float))
        link.send("formed")
    else:
        raise ProtocolError(f"unknown command {kind!r}.")


def _restore(replica: Replica, answer: Open, sent: bytes, states: StateFiles) -> str:
    """Put the replica's state where the driver wants it; says what came of it."""
    if answer.state == "sent":
        replica.load_state(sent)
        return "restored"
    if answer.state == "local":
        # Damaged or gone: reported as "reset", and the driver names the loss in the round's record.
        with contextlib.suppress(CheckpointError, OSError):
            replica.load_state(states.read(answer.kept_round, answer.kept_by))
            replica.catch_up(answer.scheduler_steps)
            return "restored"
    replica.restart(answer.scheduler_steps)
    return "fresh" if answer.state == "fresh" else "reset"
