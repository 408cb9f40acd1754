"""The driver's end of one replica's connection: what it says in words of the protocol, or why it cannot go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final, final

import torch
from torch import Tensor

from sparkdeep.errors import ProtocolError, RoundTimeoutError
from sparkdeep.protocol.messages import Failure, Hello, Update, field, parse
from sparkdeep.protocol.refusals import Body, check_size, failed
from sparkdeep.protocol.wire import Buffer, Connection, Frame, SilentError
from sparkdeep.tensors.encoding import CHECKSUM_BYTES
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["DriverLink"]

_PIECE_BYTES: Final = 1 << 20
_MAX_STATE_BYTES: Final = 1 << 36
_LOOK_S: Final = 0.25


@final
class DriverLink:
    """One replica, as the driver sees it.

    Args:
        hello: its first words.
        connection: to it.
        stall_timeout_s: silence that counts as a loss while it works.
        on_beat: called with (replica, rows of the round so far).
        on_log: called with (replica, line) for what it prints.
    """

    def __init__(
        self,
        hello: Hello,
        connection: Connection,
        *,
        stall_timeout_s: float,
        on_beat: Callable[[int, int], None],
        on_log: Callable[[int, str], None],
    ) -> None:
        self.hello = hello
        self.connection = connection
        self.waiting = True
        """Whether the replica waits for the driver, and should hear now and then that it is alive."""
        self._stall_s = stall_timeout_s
        self._on_beat = on_beat
        self._on_log = on_log
        self.buffer_limit_bytes = 0
        """Largest buffers that an update may bring; set before each round."""
        self.kept_round: int | None = None
        """The last round of this stage after which the replica has said that its state is kept."""
        self._owes: int | None = None
        self._owed_at = 0.0
        self._left = 0
        self._since = 0.0
        self._deadline = math.inf
        self._limit = ""
        self._rows = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)  # kept, as fresh pages are dear

    @property
    def who(self) -> str:
        """The replica with its host and process, for messages."""
        return self.hello.who

    def send(self, kind: str, header: dict[str, Any] | None = None, *bodies: Buffer) -> None:
        """Say something; one that takes nothing for as long as it may be silent is lost."""
        self.connection.send(kind, header, *bodies, timeout_s=self._stall_s)

    def read(self, view: memoryview) -> None:
        """Fill `view` (bytes) from the body of the current frame."""
        self.connection.read_into(view, timeout_s=self._stall_s)

    def expect(self, *kinds: str, timeout_s: float | None = None) -> Frame:
        """The next frame of one of `kinds`; beats and printed lines on the way there are passed on.

        Args:
            kinds: of the frame.
            timeout_s: of silence; None for that of a replica at work.

        Raises:
            UserCodeError, ReplicaLostError, SparkdeepError: the replica reports a failure.
            ProtocolError: it sent something else.
        """
        replica = self.hello.replica
        while True:
            frame = self.connection.receive(timeout_s=timeout_s or self._stall_s)
            if frame.kind in kinds:
                return frame
            if frame.body_bytes:
                raise ProtocolError(
                    f"replica {replica} sent {frame.kind!r} with a body; expected {' or '.join(kinds)!r}."
                )
            if not self._passed_on(frame):
                raise ProtocolError(f"replica {replica} sent {frame.kind!r}; expected {' or '.join(kinds)!r}.")

    def _passed_on(self, frame: Frame) -> bool:
        """Whether it was one of those frames that may come at any time."""
        replica = self.hello.replica
        if frame.kind == "beat":
            self._rows = field(frame.header, "rows", int)
            self._on_beat(replica, self._rows)
        elif frame.kind == "log":
            self._on_log(replica, field(frame.header, "text", str))
        elif frame.kind == "error":
            raise failed(parse(Failure, frame.header), self.hello)
        else:
            return False
        return True

    # -- a round's limits --------------------------------------------------------------------------------------------

    def begin_round(self, deadline_s: float | None) -> None:
        """A round begins, which must be over within `deadline_s`."""
        self._rows = 0
        self._since = time.monotonic()
        self._deadline = math.inf if deadline_s is None else self._since + deadline_s
        self._limit = "" if deadline_s is None else f"{deadline_s:.0f}"
        # Also while bytes come and go: a link that crawls never falls silent.
        self.connection.until, self.connection.late = self._deadline, self._check_deadline

    def await_update(self, give_up: Callable[[], bool], *before: str) -> Frame | None:
        """The round's update, or None when `give_up` says that it is not waited for any longer.

        Args:
            give_up: asked while nothing comes.
            before: kinds of frames that may come before it, and are given as well.

        Raises:
            RoundTimeoutError: the round's deadline has passed.
            ConnectionLostError: the replica is gone, or silent.
        """
        while self._speaks(give_up):
            frame = self.connection.receive(timeout_s=self._stall_s)
            if frame.kind == "update" or frame.kind in before:
                return frame
            if frame.body_bytes or not self._passed_on(frame):
                raise ProtocolError(f"{self.who} sent {frame.kind!r}; expected 'update'.")
        return None

    def undo(self, round_number: int) -> None:
        """Have the replica go back to where it was before the round; it owes an answer from now on."""
        self.send("undo", {"round": round_number})
        self._owes, self._owed_at = round_number, time.monotonic()
        self.waiting = True

    def settle(self, give_up: Callable[[], bool]) -> bool:
        """Wait until the replica has gone back, if it was to; whether it has.

        What it sent before it heard of that is read and forgotten.
        """
        while self._owes is not None:
            if not self._drained(give_up) or not self._speaks(give_up):
                return False
            frame = self.connection.receive(timeout_s=self._stall_s)
            if frame.kind == "undone" and frame.header.get("round") == self._owes:
                self.kept_round, self._owes = self._owes, None
            elif frame.kind == "update":
                self.leave(frame)
            elif frame.kind not in {"saved", "undone"} and not self._passed_on(frame):
                raise ProtocolError(f"{self.who} sent {frame.kind!r}; expected 'undone'.")
        return True

    def leave(self, frame: Frame) -> None:
        """Do not wait for a body; `settle` reads and forgets it, before anything that comes after it."""
        self._left = frame.body_bytes

    def _drained(self, give_up: Callable[[], bool]) -> bool:
        """Read what is left of a body, and forget it; whether all of it came before `give_up`."""
        piece = memoryview(bytearray(min(_PIECE_BYTES, self._left)))
        while self._left:
            if not self._speaks(give_up):
                return False
            part = piece[: min(self._left, len(piece))]
            self.read(part)
            self._left -= len(part)
        return True

    def _speaks(self, give_up: Callable[[], bool]) -> bool:
        """Wait for the replica to say something; False when `give_up` says that it is not waited for any longer."""
        while True:
            self.connection.check()
            ready = self.connection.readable()
            # One that a round went on without is not to gain time by each round that follows.
            since = self._since if self._owes is None else self._owed_at
            if not ready and time.monotonic() - max(since, self.connection.heard) > self._stall_s:
                raise SilentError(f"{self.connection.peer} sent nothing for {self._stall_s:g} s.")
            if give_up():
                return False
            self._check_deadline()
            if ready or self.connection.readable(_LOOK_S):
                return True

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise RoundTimeoutError(
                f"{self.who} did not end the round within its deadline of {self._limit} s, after {self._rows} rows: it is "
                "ten times the median of the rounds before it, and at least min_round_timeout_s. If this replica's host "
                "is merely slow, raise min_round_timeout_s, or let rounds close without it by quorum=.",
                replica=self.hello.replica,
                host=self.hello.host,
            )

    def answer(self, kind: str) -> bytes:
        """The body of the next frame of `kind`."""
        self.waiting = False
        frame = self.expect(kind)
        data = self.connection.read_body(frame.body_bytes, limit_bytes=_MAX_STATE_BYTES, timeout_s=self._stall_s)
        self.waiting = True
        return data

    def body(self, frame: Frame, update: Update, vector_bytes: int) -> Body:
        """The body of a frame's update, still on its way.

        Raises:
            ProtocolError: it has another size than its header says.
        """
        limit = self.buffer_limit_bytes
        check_size(self.hello.replica, frame.body_bytes, update, vector_bytes, buffer_limit_bytes=limit)
        return self._body()

    def _body(self) -> Body:
        return Body(
            self.read,
            who=self.who,
            replica=self.hello.replica,
            host=self.hello.host,
            scratch=self._scratch,
        )

    def read_change(self, frame: Frame, into: Tensor) -> None:
        """Fill `into`, contiguous, from a frame that brings nothing else.

        Raises:
            ReplicaLostError: it was damaged on its way; the round is void.
            ProtocolError: it has another size.
        """
        size = raw_bytes(into).nbytes
        if frame.body_bytes != size + CHECKSUM_BYTES:
            raise ProtocolError(
                f"{self.who} sent a {frame.kind} of {frame.body_bytes} bytes; {size} and a checksum were expected."
            )
        body = self._body()
        body.fill(into)
        body.verify()

    def go_on(self, parameters: Tensor | None) -> None:
        """Let a replica that came in by a visit go on, with the parameters that it fetches; its silence counts anew."""
        self.waiting = False
        if parameters is not None:
            self.send("fetched", None, raw_bytes(parameters))
        self._since = time.monotonic()
