"""A replica's life in one stage: hello, rounds as the driver asks for them, farewell."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable

import torch

from sparkdeep import seams
from sparkdeep.data.shards import Shard
from sparkdeep.errors import CheckpointError, ProtocolError, ReplicaLostError, SparkdeepError, UserCodeError
from sparkdeep.models.program import unpack_program
from sparkdeep.protocol.messages import Failure, Hello, Open, field
from sparkdeep.protocol.plans import ReplicaPlan
from sparkdeep.protocol.wire import ConnectionLostError, Frame
from sparkdeep.replica.channel import Channel
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.round import ReplicaRounds, keep_state
from sparkdeep.storage.state_files import StateFiles
from sparkdeep.tensors.state_dicts import pack

__all__ = ["open_replica", "serve"]


def serve(channel: Channel, hello: Hello, build: Callable[[], Replica], states: StateFiles) -> None:
    """Answer the driver until it says stop.

    A failure of the user's code, or of ours, is reported with its traceback before it is raised.

    Raises:
        ConnectionLostError: the driver is gone; nothing is left to do.
    """
    where = "introduction"
    try:
        answer, tensors, sent = channel.introduce(hello)
        where = "building the model and optimizer"
        replica = build()
        seams.reach("load", round_number=answer.committed + 1, replica=hello.replica)
        replica.load_tensors(tensors)
        channel.opened(_restore(replica, answer, sent, states))
        rounds = ReplicaRounds(channel, replica, states, keep=answer.keep)
        frame: Frame | None = None
        while True:
            frame = frame or channel.command()
            where = f"command {frame.kind!r}"
            if frame.kind == "stop":
                if frame.header.get("save") is not None:
                    replica.catch_up(field(frame.header, "clock", int))
                    keep_state(states, field(frame.header, "save", int), replica.save_state())
                channel.send("bye")
                return
            if frame.kind == "train":
                frame = rounds.run(frame)
                continue
            _obey(channel, replica, rounds, frame)
            frame = None
    except (ConnectionLostError, ProtocolError):
        raise
    except Exception as error:
        channel.fail(
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


def _obey(channel: Channel, replica: Replica, rounds: ReplicaRounds, frame: Frame) -> None:
    kind, header = frame.kind, frame.header
    if kind == "evaluate":
        # What the next round starts from may not be overwritten where it is not sent whole.
        follows = replica.exchange.overlap or replica.exchange.down.lossy
        parameters = replica.layout.empty() if follows else replica.exchange.known
        channel.read_vector(parameters)
        replica.load_for_scoring(parameters, channel.read_bytes(field(header, "buffer_bytes", int)))
        channel.send("scores", {}, pack(replica.evaluate()))
    elif kind == "undo":
        rounds.go_back(field(header, "round", int))
    elif kind == "state":
        replica.catch_up(field(header, "clock", int))
        channel.send("state", {}, replica.save_state())
    elif kind == "probe":
        channel.send("probed", {}, channel.read_bytes(frame.body_bytes))
    elif kind == "trial":
        rounds.try_ring(field(header, "numel", int))
        channel.send("tried")
    elif kind == "ring":
        rounds.join_ring(field(header, "size", int), field(header, "timeout_s", float))
        channel.send("formed")
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


def open_replica(plan: ReplicaPlan, channel: Channel, shard: Shard, *, number: int, device: torch.device) -> Replica:
    """Build a replica from the plan; the user's model is made here."""
    program = unpack_program(plan.program)
    return Replica(program, plan.settings, plan.schema, shard, number=number, device=device, beat=channel.beat)
