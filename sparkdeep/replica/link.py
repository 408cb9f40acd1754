"""The replica's end of the parameter plane: it dials the driver, and then does what it is asked for."""

from __future__ import annotations

import io
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, final

import torch

from sparkdeep import seams
from sparkdeep.errors import CoordinatorUnreachableError, ProtocolError
from sparkdeep.protocol.messages import Address, Failure, Hello, Open, Opened, Visit, field, parse, to_header
from sparkdeep.protocol.tls import TlsSocket, client_context
from sparkdeep.protocol.wire import Buffer, Connection, ConnectionLostError, Frame
from sparkdeep.replica.overlapping import Pace
from sparkdeep.replica.update import LocalResult, LocalUpdate
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, CHUNK, checksummed, chunks_of
from sparkdeep.tensors.parameters import raw_bytes

if TYPE_CHECKING:
    from sparkdeep.replica.job import Letter

__all__ = ["LogStream", "ReplicaLink"]

# The driver gives a sign of life every few seconds while a replica waits; this long without one means that it is gone.
DRIVER_SILENCE_S = 120.0
_SMALL_BODY_BYTES = 1 << 34
_PIECE_BYTES = 1 << 20


@final
class ReplicaLink:
    """A replica's connection to the driver: to the coordinator, or by letter.

    Raises (all methods):
        ConnectionLostError: the driver is gone or silent.
        ProtocolError: it said something that does not belong here.
    """

    def __init__(self, connection: Connection | Letter, driver_host: str = "") -> None:
        self._connection = connection
        self._driver_host = driver_host
        self._undo: int | None = None

    @classmethod
    def dial(cls, address: Address, token: bytes, *, connect_timeout_s: float, who: str) -> ReplicaLink:
        """Connect to the coordinator, trying again until `connect_timeout_s` is over.

        Raises:
            CoordinatorUnreachableError: naming the settings that change the address.
            ProtocolError: something else than this run's coordinator answers there.
        """
        deadline = time.monotonic() + connect_timeout_s
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                sock = _dial_nearby(address) or _dial_port(address, left)
            except OSError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                raise CoordinatorUnreachableError(
                    f"{who} cannot reach the driver's coordinator at {address.host}:{address.port} within "
                    f"{connect_timeout_s:g} s: {error}. The executors must be able to open a TCP connection to the "
                    "driver: set coordinator_host= to a name or address of the driver that they can reach (default: "
                    "spark.driver.host), and coordinator_port= to a port, or range of ports, that the firewall lets in."
                ) from error
            return cls(Connection(sock, token), address.host)

    def introduce(self, hello: Hello) -> tuple[Open, bytes, bytes]:
        """Say hello; returns the driver's answer, the module's tensors and this replica's state (both as bytes)."""
        self._connection.send("hello", to_header(hello))
        frame = self.command()
        if frame.kind != "open":
            raise ProtocolError(f"expected 'open' after the hello, got {frame.kind!r}.")
        answer = parse(Open, frame.header)
        tensors = self.read_bytes(answer.tensor_bytes)
        return answer, tensors, self.read_bytes(frame.body_bytes - answer.tensor_bytes)

    def opened(self, state: str) -> None:
        """Report for duty."""
        self._connection.send("opened", to_header(Opened(state=state)))

    def command(self) -> Frame:
        """The next frame that is more than a sign of life."""
        while True:
            frame = self._connection.receive(timeout_s=DRIVER_SILENCE_S)
            if frame.kind == "refused":
                raise ProtocolError(f"the driver refused this replica: {frame.header.get('reason')}")
            if frame.kind != "alive":
                return frame

    @property
    def local_host(self) -> str:
        """This replica's address as others reach it: that of its end of the connection, or, on the driver's host, the driver's."""
        return self._connection.local_host or self._driver_host

    def read_vector(self, into: torch.Tensor, pace: Pace | None = None) -> None:
        """Fill `into`, contiguous on the CPU, from the current frame's body; with `pace`, each fragment in its time."""
        if pace is None or pace.fragments == 1:
            self._connection.read_into(raw_bytes(into), timeout_s=DRIVER_SILENCE_S)
            return
        count = -(-into.numel() // CHUNK)
        for start, stop in pace.spread(chunks_of(into.numel()), count, inwards=True):
            self._connection.read_into(raw_bytes(into[start:stop]), timeout_s=DRIVER_SILENCE_S)

    def read_change(self, exchange: LocalUpdate, pace: Pace | None = None) -> None:
        """Take the next global parameters from the current frame's body, as the change of those that are known."""
        numel = exchange.known.numel()
        count = -(-numel // CHUNK)
        scratch = torch.empty(exchange.down.num_bytes(min(CHUNK, numel), exchange.known.dtype), dtype=torch.uint8)
        chunks = chunks_of(numel)
        for start, stop in pace.spread(chunks, count, inwards=True) if pace else chunks:
            part = scratch[: exchange.down.num_bytes(stop - start, exchange.known.dtype)]
            self.read_vector(part)
            exchange.take(part, start, stop)

    def read_bytes(self, num_bytes: int) -> bytes:
        """The next `num_bytes` of the current frame's body."""
        return self._connection.read_body(num_bytes, limit_bytes=_SMALL_BODY_BYTES, timeout_s=DRIVER_SILENCE_S)

    def beat(self, rows: int, steps: int) -> None:
        """Tell the driver how far this round is."""
        self._connection.try_send("beat", {"rows": rows, "steps": steps})

    def update(self, result: LocalResult, *, vector: bool = True, pace: Pace | None = None) -> None:
        """Send a round's header and body; the driver takes the body once every replica's header is admitted.

        Args:
            result: of the round's local work.
            vector: whether the body has the vector; in a ring it does not.
            pace: spreads the body over the round that is trained meanwhile.
        """
        seams.reach("transfer", round_number=result.update.round, replica=result.replica)
        body = result.body(vector=vector)
        self._connection.stream(
            "update",
            to_header(result.update),
            result.body_bytes(vector=vector),
            pace.spread(body, -(-result.vector.numel() // CHUNK), inwards=False) if pace else body,
            timeout_s=DRIVER_SILENCE_S,
            check=self._listen,
        )

    def visit(self, visit: Visit, change: torch.Tensor, replica: int) -> None:
        """Come in between two steps; `change`, (numel,), goes along if it is pushed."""
        seams.reach("transfer", round_number=visit.round, replica=replica)
        data = raw_bytes(change) if visit.pushes else memoryview(b"")
        body = checksummed(data[at : at + _PIECE_BYTES] for at in range(0, data.nbytes, _PIECE_BYTES))
        self._connection.stream(
            "visit",
            to_header(visit),
            data.nbytes + CHECKSUM_BYTES if visit.pushes else 0,
            seams.through("transfer", body, round_number=visit.round, replica=replica) if visit.pushes else (),
            timeout_s=DRIVER_SILENCE_S,
            check=self._listen,
        )

    def fetched(self, into: torch.Tensor) -> None:
        """Wait for the global parameters, (numel,), that a visit asked for."""
        frame = self.command()
        if frame.kind != "fetched" or frame.body_bytes != raw_bytes(into).nbytes:
            raise ProtocolError(f"expected the parameters, got {frame.kind!r} with {frame.body_bytes} bytes.")
        self.read_vector(into)

    @property
    def undone(self) -> int | None:
        """The round that the driver wants undone, as far as `look` or `update` has heard; given once."""
        undone, self._undo = self._undo, None
        return undone

    def look(self) -> bool:
        """Whether the driver wants the present round undone; what it says meanwhile is read without waiting."""
        self._listen()
        return self._undo is not None

    def _listen(self) -> None:
        """While a body waits to be taken: hear that the driver lives, though another replica keeps it waiting."""
        while self._connection.readable():
            frame = self._connection.receive(timeout_s=DRIVER_SILENCE_S)
            if frame.kind == "undo":
                self._undo = field(frame.header, "round", int)
                return  # what follows is of another round
            if frame.kind != "alive":
                raise ProtocolError(f"the driver sent {frame.kind!r} while an update was on its way.")

    def send(self, kind: str, header: dict[str, Any] | None = None, *bodies: Buffer) -> None:
        """Send any other frame."""
        self._connection.send(kind, header, *bodies)

    def send_body(self, kind: str, body: memoryview) -> None:
        """Send a frame whose body is followed by its checksum."""
        pieces = (body[start : start + _PIECE_BYTES] for start in range(0, body.nbytes, _PIECE_BYTES))
        self._connection.stream(
            kind,
            None,
            body.nbytes + CHECKSUM_BYTES,
            checksummed(pieces),
            timeout_s=DRIVER_SILENCE_S,
            check=self._listen,
        )

    def put(self, key: str, value: bytes) -> None:
        """Store a value where the replicas of the stage meet."""
        self.send("put", {"key": key, "value": value.decode("latin-1")})

    def get(self, key: str) -> bytes:
        """Wait for a value there, and give it."""
        self.send("get", {"key": key})
        frame = self.command()
        if frame.kind != "value":
            raise ProtocolError(f"expected a value of the meeting, got {frame.kind!r}.")
        value: str = field(frame.header, "value", str)
        try:
            return value.encode("latin-1")
        except UnicodeEncodeError as error:
            raise ProtocolError(f"a value of the meeting is no bytes: {error}") from error

    def fail(self, failure: Failure) -> None:
        """Last words; nobody may be listening any more."""
        try:
            self._connection.send("error", to_header(failure), timeout_s=5.0)
        except ConnectionLostError:
            return  # the exception that led here is raised by the caller and reaches Spark

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _dial_nearby(address: Address) -> socket.socket | None:
    """A connection by the driver's Unix socket; None where the driver is on another host or in another container."""
    if not address.nearby:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"\0{address.nearby}")
    except OSError:
        sock.close()
        return None
    return sock


def _dial_port(address: Address, timeout_s: float) -> socket.socket | TlsSocket:
    deadline = time.monotonic() + timeout_s
    sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
    if not address.certificate:
        return sock
    return TlsSocket.connect(
        sock,
        client_context(address.certificate),
        certificate=address.certificate,
        timeout_s=max(0.1, deadline - time.monotonic()),
    )


@final
class LogStream(io.TextIOBase):
    """A text stream whose lines travel to the driver."""

    def __init__(self, link: ReplicaLink | Letter) -> None:
        self._link = link
        self._line = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Keep `text` until its line is complete."""
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._link.send("log", {"text": line[:8192]})
        return len(text)

    def flush(self) -> None:
        """Lines go out when they are complete; half a line waits."""

    def end(self) -> None:
        """Half a line goes out too."""
        if self._line:
            self.write("\n")
