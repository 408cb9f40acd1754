"""A replica's life in one stage: hello, rounds as the driver asks for them, farewell."""

from __future__ import annotations

import contextlib
import platform
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from sparkdeep.channel import Channel
from sparkdeep.errors import CheckpointError, ProtocolError, ReplicaLostError, SparkdeepError, UserCodeError
from sparkdeep.messages import Failure, Hello, Open
from sparkdeep.replica import Replica
from sparkdeep.schedule import RoundSpec
from sparkdeep.state_files import StateFiles, own_files
from sparkdeep.trees import pack
from sparkdeep.wire import ConnectionLostError

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
        replica.load_tensors(tensors)
        channel.opened(_restore(replica, answer, sent, states))
        while True:
            frame = channel.command()
            where = f"command {frame.kind!r}"
            if frame.kind == "stop":
                if (committed := frame.header.get("save")) is not None:
                    _keep(states, committed, replica.save_state())
                channel.send("bye")
                return
            _obey(channel, replica, frame.kind, frame.header, states, keep=answer.keep)
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


def _keep(states: StateFiles, round_number: int, data: bytes) -> None:
    with own_files("it kept the replica's state"):
        states.write(round_number, data)


def _obey(
    channel: Channel, replica: Replica, kind: str, header: dict[str, Any], states: StateFiles, *, keep: bool
) -> None:
    if kind == "train":
        _load(channel, replica, header)
        spec = RoundSpec(**header["spec"])
        channel.update(replica.train(spec))
        began = time.perf_counter()
        data = replica.save_state() if keep else b""
        if keep:
            _keep(states, spec.round, data)
        channel.send("saved", {"bytes": len(data), "seconds": time.perf_counter() - began})
    elif kind == "evaluate":
        _load(channel, replica, header)
        channel.send("scores", {}, pack(replica.evaluate()))
    elif kind == "state":
        channel.send("state", {}, replica.save_state())
    else:
        raise ProtocolError(f"unknown command {kind!r}.")


def _load(channel: Channel, replica: Replica, header: dict[str, Any]) -> None:
    channel.read_vector(replica.flat)
    sections = header["sections"]
    values = replica.layout.empty(len(sections))
    channel.read_vector(values)
    replica.load_parameters(channel.read_bytes(header["buffer_bytes"]))
    replica.load_inner_state(sections, values)


def _restore(replica: Replica, answer: Open, sent: bytes, states: StateFiles) -> str:
    """Put the replica's state where the driver wants it; says what came of it."""
    if answer.state == "sent":
        replica.load_state(sent)
        return "restored"
    if answer.state == "local":
        # Damaged or gone: reported as "reset", and the driver names the loss in the round's record.
        with contextlib.suppress(CheckpointError, OSError):
            replica.load_state(states.read(answer.committed))
            return "restored"
    replica.restart(answer.scheduler_steps)
    return "reset" if answer.state == "local" else "fresh"
