"""The driver's end of one replica's connection: what it says in words of the protocol, or why it cannot go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final, final

import torch
from torch import Tensor

from sparkdeep.errors import ProtocolError, ReplicaLostError, RoundTimeoutError, SparkdeepError, UserCodeError
from sparkdeep.protocol.messages import Failure, Hello, Update, field, parse
from sparkdeep.protocol.wire import Buffer, Connection, Frame, SilentError
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, CHUNK, Checksum, Codec, encoded_bytes
from sparkdeep.tensors.mean import Combining
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import unpack_tensors

__all__ = ["Line"]

_PIECE_BYTES: Final = 1 << 20
_MAX_STATE_BYTES: Final = 1 << 36
_LOOK_S: Final = 0.25


@final
class Line:
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
        """Whether the replica waits for the driver, and should be told now and then that it is alive."""
        self._stall_s = stall_timeout_s
        self._on_beat = on_beat
        self._on_log = on_log
        self.buffer_limit_bytes = 0
        """Largest buffers that an update may bring; set before each round."""
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.kept_round: int | None = None
        """The last round of this stage after which the replica has said that its state is kept."""
        self._owes: int | None = None
        self._owed_at = 0.0
        self._left = 0
        self._since = 0.0
        self._deadline = math.inf
        self._limit = ""
        self._rows = 0

    @property
    def who(self) -> str:
        """The replica with its host and process, for messages."""
        return f"replica {self.hello.replica} on {self.hello.host} (process {self.hello.pid})"

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
            raise self._failed(parse(Failure, frame.header))
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
        # Also while bytes come and go: a line that crawls never falls silent.
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
        """Wait until the replica has gone back, if it was told to; whether it has.

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

    def add_update(
        self,
        frame: Frame,
        update: Update,
        total: Combining,
        codec: Codec,
        *,
        dtype: torch.dtype,
        check: Callable[[], None],
    ) -> dict[str, Tensor]:
        """Add an admitted update's body to the sum as it arrives; returns its buffers.

        Args:
            frame: the update's; its body is still on the way.
            update: its header.
            total: the round's sum.
            codec: of the body's vector.
            dtype: of the vector before it was encoded.
            check: called while other replicas have their turn; raises to give up.

        Raises:
            ReplicaLostError: the body was damaged on its way; the round is void.
            ProtocolError: the body has another size than its header says.
        """
        assert total.chunk == CHUNK, "chunks are encoded as they are summed"
        vector_bytes = encoded_bytes(codec, total.numel, dtype)
        self._check_size(frame, update, vector_bytes)
        if self._scratch.numel() < (size := codec.num_bytes(CHUNK, dtype)):
            self._scratch = torch.empty(size, dtype=torch.uint8)
        checksum = Checksum()

        def chunks(start: int, stop: int) -> Tensor:
            part = self._scratch[: codec.num_bytes(stop - start, dtype)]
            view = raw_bytes(part)
            self.read(view)
            checksum.update(view)
            return codec.decode(part, stop - start, dtype)

        total.add(self.hello.replica, chunks, check)
        return self._buffers(update, checksum)

    def read_buffers(self, frame: Frame, update: Update) -> dict[str, Tensor]:
        """The buffers of an update that brings no vector; see `add_update` for what is raised."""
        self._check_size(frame, update, 0)
        return self._buffers(update, Checksum())

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
        self._verify(self._filled(into))

    def read_update(self, frame: Frame, update: Update, into: Tensor) -> dict[str, Tensor]:
        """Fill `into` from a whole update; returns its buffers. See `add_update` for what is raised."""
        self._check_size(frame, update, raw_bytes(into).nbytes)
        return self._buffers(update, self._filled(into))

    def _filled(self, into: Tensor) -> Checksum:
        view, checksum = raw_bytes(into), Checksum()
        for start in range(0, view.nbytes, _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self.read(piece)
            checksum.update(piece)
        return checksum

    def go_on(self, parameters: Tensor | None) -> None:
        """Let a replica that came in by a visit go on, with the parameters that it fetches; its silence counts anew."""
        self.waiting = False
        if parameters is not None:
            self.send("fetched", None, raw_bytes(parameters))
        self._since = time.monotonic()

    def _check_size(self, frame: Frame, update: Update, vector_bytes: int) -> None:
        expected = vector_bytes + update.buffer_bytes + CHECKSUM_BYTES
        if frame.body_bytes != expected or not 0 <= update.buffer_bytes <= self.buffer_limit_bytes:
            raise ProtocolError(
                f"replica {self.hello.replica} announced a body of {frame.body_bytes} bytes with {update.buffer_bytes} of "
                f"buffers; expected {vector_bytes} of parameters, at most {self.buffer_limit_bytes} of buffers and a checksum."
            )

    def _buffers(self, update: Update, checksum: Any) -> dict[str, Tensor]:
        data = self.connection.read_body(
            update.buffer_bytes, limit_bytes=self.buffer_limit_bytes, timeout_s=self._stall_s
        )
        checksum.update(data)
        self._verify(checksum)
        return unpack_tensors(data) if data else {}

    def _verify(self, checksum: Any) -> None:
        told = self.connection.read_body(CHECKSUM_BYTES, limit_bytes=CHECKSUM_BYTES, timeout_s=self._stall_s)
        if told != checksum.digest():
            raise ReplicaLostError(
                f"the update of {self.who} was damaged on its way (checksum differs); the round is void.",
                replica=self.hello.replica,
                host=self.hello.host,
            )

    def _failed(self, failure: Failure) -> SparkdeepError:
        replica, host = self.hello.replica, self.hello.host
        if failure.cause == "user":
            return UserCodeError(
                f"{failure.traceback.rstrip()}\n\n{failure.message}\n(raised on {self.who}, in {failure.where}; not retried)",
                replica=replica,
                host=host,
                traceback_text=failure.traceback,
            )
        if failure.cause == "lost":
            text = f"{self.who} failed in {failure.where}: {failure.message}\n{failure.traceback.rstrip()}"
            return ReplicaLostError(text, replica=replica, host=host)
        return SparkdeepError(f"{self.who} failed in {failure.where}: {failure.message}\n{failure.traceback}")
