"""A replica's life in one stage: hello, rounds as the driver asks for them, farewell."""

from __future__ import annotations

import contextlib
import platform
import traceback
from collections.abc import Callable

import torch

from sparkdeep import seams
from sparkdeep.channel import Channel
from sparkdeep.errors import CheckpointError, ProtocolError, ReplicaLostError, SparkdeepError, UserCodeError
from sparkdeep.messages import Failure, Hello, Open
from sparkdeep.replica import Replica
from sparkdeep.replica_rounds import ReplicaRounds, keep_state
from sparkdeep.state_files import StateFiles
from sparkdeep.trees import pack
from sparkdeep.wire import ConnectionLostError, Frame

__all__ = ["serve", "versions"]


def versions() -> dict[str, str]:
    """What must agree between driver and executors."""
    from sparkdeep import __version__

    python = ".".join(platform.python_version_tuple()[:2])
    # A driver without a GPU may have torch's CPU build: "+cpu" and "+cu128" are the same release.
    return {"python": python, "torch": torch.__version__.split("+")[0], "sparkdeep": __version__}


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
                if (committed := frame.header.get("save")) is not None:
                    replica.catch_up(int(frame.header["clock"]))
                    keep_state(states, committed, replica.save_state())
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
        replica.load_for_scoring(parameters, channel.read_bytes(header["buffer_bytes"]))
        channel.send("scores", {}, pack(replica.evaluate()))
    elif kind == "undo":
        rounds.go_back(int(header["round"]))
    elif kind == "state":
        replica.catch_up(int(header["clock"]))
        channel.send("state", {}, replica.save_state())
    elif kind == "probe":
        channel.send("probed", {}, channel.read_bytes(frame.body_bytes))
    elif kind == "trial":
        rounds.try_ring(int(header["numel"]))
        channel.send("tried")
    elif kind == "ring":
        rounds.join_ring(int(header["size"]), float(header["timeout_s"]))
        channel.send("formed")
    else:
        raise ProtocolError(f"unknown command {kind!r}.")


def _restore(replica: Replica, answer: Open, sent: bytes, states: StateFiles) -> str:
    """Put the replica's state where the driver wants it; says what came of it."""
    if answer.state == "sent":
        replica.load_state(sent)
        return "restored"
    if answer.state in {"local", "behind"}:
        # Damaged or gone: reported as "reset", and the driver names the loss in the round's record.
        with contextlib.suppress(CheckpointError, OSError):
            replica.load_state(_kept(states, answer))
            replica.catch_up(answer.scheduler_steps)
            return "restored"
    replica.restart(answer.scheduler_steps)
    return "fresh" if answer.state == "fresh" else "reset"


def _kept(states: StateFiles, answer: Open) -> bytes:
    """The state that the driver means.

    Raises:
        FileNotFoundError: it is not here.
    """
    if answer.state == "local":
        return states.read(answer.committed)
    return states.read(max((r for r in states.rounds() if r <= answer.committed), default=0))
