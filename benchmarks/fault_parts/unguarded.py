"""sparkdeep without its guards, for one comparison: no checksum, digest, token, deadline or check of a number is at work.

Nothing else imports this. A guard that is not found where it is looked for is an error: the comparison would be of nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from speed_parts import plain_replicas

from sparkdeep.protocol.messages import ReplicaPlan, Ticket

__all__ = ["GUARDS", "replica", "unguarded"]

_DIGEST: Final = bytes(8)


class _NoChecksum:
    """Takes a checksum's place, and looks at nothing."""

    def __init__(self, _data: Any = None) -> None:
        pass

    def update(self, _data: Any) -> None:
        """Nothing."""

    def digest(self) -> bytes:
        """The same of everything."""
        return _DIGEST


def _nothing(*_arguments: Any, **_more: Any) -> None:
    """In place of a check."""


def _yes(*_arguments: Any, **_more: Any) -> bool:
    """In place of a question."""
    return True


def _without_poll(connect: Callable[..., None]) -> Callable[..., None]:
    def connected(self: Any, sock: Any, *arguments: Any, **more: Any) -> None:
        connect(self, sock, *arguments, **more)
        sock.settimeout(None)

    return connected


def _without_deadline(transfer: Callable[..., None]) -> Callable[..., None]:
    def endless(self: Any, view: memoryview, _timeout_s: float, *_more: Any) -> None:
        transfer(self, view, float("inf"))

    return endless


# (module, name or Class.name, what takes its place, what it is): what makes a wrapper is given what was there.
GUARDS: Final[Sequence[tuple[str, str, Any, str]]] = (
    ("sparkdeep.tensors.encoding", "Checksum", _NoChecksum, "the checksum of every body, where it is sent"),
    ("sparkdeep.protocol.refusals", "Checksum", _NoChecksum, "and where it is received"),
    ("sparkdeep.replica.update", "LocalUpdate.finite", _yes, "whether an update is finite, at the replica"),
    ("sparkdeep.stages.admission", "check_update", _nothing, "whether a header may be counted, at the driver"),
    ("sparkdeep.protocol.wire", "hmac", SimpleNamespace(compare_digest=_yes), "the token of every frame"),
    ("sparkdeep.stages.opener", "check_shard", _nothing, "a shard's digest and rows"),
    ("sparkdeep.stages.opener", "check_versions", _nothing, "versions of the replicas"),
    ("sparkdeep.replica.link", "ReplicaLink.beat", _nothing, "signs of life of a replica at work"),
    ("sparkdeep.stages.stage", "Stage._stay_alive", _nothing, "and of the driver"),
)
_WRAPPED: Final[Sequence[tuple[str, str, Callable[[Any], Any], str]]] = (
    (
        "sparkdeep.protocol.wire",
        "Connection.__init__",
        _without_poll,
        "waking up four times a second to look at deadlines",
    ),
    ("sparkdeep.protocol.wire", "Connection._read", _without_deadline, "the deadline of a read"),
    ("sparkdeep.protocol.wire", "Connection._write", _without_deadline, "the deadline of a write"),
)


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Take every guard out of this process, and put it back.

    Raises:
        LookupError: a guard has moved; this module must follow.
    """
    with contextlib.ExitStack() as undone:
        for module, name, instead, _ in GUARDS:
            undone.callback(_replaced(module, name, functools.partial(_in_place_of, instead)))
        for module, name, wrap, _ in _WRAPPED:
            undone.callback(_replaced(module, name, wrap))
        yield


def _in_place_of(instead: Any, _before: Any) -> Any:
    return instead


def _replaced(module: str, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    owner: Any = importlib.import_module(module)
    *classes, attribute = name.split(".")
    for one in classes:
        owner = getattr(owner, one, None)
    if owner is None or attribute not in vars(owner):
        raise LookupError(f"{module} has no {name} any more: say in {Path(__file__).name} what guards in its place.")
    before = vars(owner)[attribute]
    setattr(owner, attribute, wrap(before))
    return lambda: setattr(owner, attribute, before)


def replica(
    number: int, connection: Pipe, ticket: Ticket, plan: ReplicaPlan, shards: Sequence[Path], states: Path
) -> None:
    """A replica as `plain_replicas` starts them, without its guards."""
    with unguarded():
        plain_replicas.serve_replica(number, connection, ticket, plan, shards, states)
