"""The replica's end of the parameter plane: it dials the driver, and then does as it is told."""

from __future__ import annotations

import io
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, final

import torch

from sparkdeep.errors import CoordinatorUnreachableError, ProtocolError
from sparkdeep.messages import Failure, Hello, Open, Opened, parse, to_header
from sparkdeep.parameters import raw_bytes
from sparkdeep.replica import LocalResult
from sparkdeep.wire import Buffer, Connection, ConnectionLostError, Frame

__all__ = ["Address", "Channel", "LogStream"]

# The driver gives a sign of life every few seconds while a replica waits; this long without one means that it is gone.
DRIVER_SILENCE_S = 120.0
_SMALL_BODY_BYTES = 1 << 34


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the coordinator listens, as replicas see it."""

    host: str
    port: int


@final
class Channel:
    """A replica's connection to the coordinator.

    Raises (all methods):
        ConnectionLostError: the driver is gone or silent.
        ProtocolError: it said something that does not belong here.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    def dial(cls, address: Address, token: bytes, *, connect_timeout_s: float, who: str) -> Channel:
        """Connect to the coordinator, trying again until `connect_timeout_s` is over.

        Raises:
            CoordinatorUnreachableError: naming the settings that change the address.
        """
        deadline = time.monotonic() + connect_timeout_s
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                sock = socket.create_connection((address.host, address.port), timeout=left)
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
            return cls(Connection(sock, token))

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

    def read_vector(self, into: torch.Tensor) -> None:
        """Fill `into`, contiguous on the CPU, from the current frame's body."""
        self._connection.read_into(raw_bytes(into), timeout_s=DRIVER_SILENCE_S)

    def read_bytes(self, num_bytes: int) -> bytes:
        """The next `num_bytes` of the current frame's body."""
        return self._connection.read_body(num_bytes, limit_bytes=_SMALL_BODY_BYTES, timeout_s=DRIVER_SILENCE_S)

    def beat(self, rows: int, steps: int) -> None:
        """Tell the driver how far this round is."""
        self._connection.send("beat", {"rows": rows, "steps": steps})

    def update(self, result: LocalResult) -> None:
        """Send a round's header and, once every replica's is admitted, the body."""
        self._connection.send("update", to_header(result.update))
        frame = self.command()
        if frame.kind != "send":
            raise ProtocolError(f"expected 'send' after the update's header, got {frame.kind!r}.")
        if result.update.weight > 0:
            vector = raw_bytes(result.vector)
            self._connection.send("body", {}, vector, result.buffers, timeout_s=DRIVER_SILENCE_S)

    def send(self, kind: str, header: dict[str, Any] | None = None, *bodies: Buffer) -> None:
        """Send any other frame."""
        self._connection.send(kind, header, *bodies)

    def fail(self, failure: Failure) -> None:
        """Last words; nobody may be listening any more."""
        try:
            self._connection.send("error", to_header(failure), timeout_s=5.0)
        except ConnectionLostError:
            return  # the exception that led here is raised by the caller and reaches Spark

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class LogStream(io.TextIOBase):
    """A text stream whose lines travel to the driver."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
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
                self._channel.send("log", {"text": line[:8192]})
        return len(text)

    def flush(self) -> None:
        """Lines go out when they are complete; half a line waits."""
