"""A conversation by letter: the driver's words were all written beforehand, and the replica's are kept for its reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final, final

from sparkdeep.errors import ProtocolError, ReplicaLostError, ShardLostError
from sparkdeep.protocol.messages import Hello, parse, to_header
from sparkdeep.protocol.orders import Job
from sparkdeep.protocol.refusals import check_shard, check_versions
from sparkdeep.protocol.wire import Buffer, Frame

__all__ = ["Letter"]

_MAX_LINES: Final = 500
_MAX_LINE: Final = 2000


@final
class Letter:
    """Stands for the connection where a job gives one order: what the driver would refuse is refused here.

    Args:
        job: what the driver says.
        beat: called whenever the replica gets further, once it is built.

    Raises (`send`):
        ShardLostError, ShardMismatchError, VersionMismatchError: this is not the replica that was meant.
        ReplicaLostError: its state is gone, and the job is void.
    """

    local_host = ""

    def __init__(self, job: Job, beat: Callable[[], None] = lambda: None) -> None:
        self._job = job
        self._beat = beat
        self._frames = self._heard()
        self._left = memoryview(b"")
        self.said: dict[str, dict[str, Any]] = {}
        """Headers of the replica's frames, by kind."""
        self.bodies: tuple[Buffer, ...] = ()
        """What it said with the last of them that had a body."""
        self.lines: list[str] = []
        """The first lines that it printed."""

    def _heard(self) -> Iterator[tuple[str, dict[str, Any], Buffer]]:
        job, replica = self._job, self.said["hello"]["replica"]
        fixed = b"" if job.fixed is None else bytes(job.fixed.open())
        state = bytes(job.states[replica].open()) if job.states else b""
        yield "open", to_header(replace(job.opening, tensor_bytes=len(fixed))), fixed + state
        yield job.kind, to_header(job.order), b"" if job.body is None else job.body.open()
        yield "stop", {"save": None}, b""

    def receive(self, **_: Any) -> Frame:
        """The next of the driver's words."""
        kind, header, body = next(self._frames)
        self._left = memoryview(body).cast("B")
        return Frame(kind=kind, header=header, body_bytes=len(self._left))

    def read_into(self, view: memoryview, **_: Any) -> None:
        """Fill `view` (bytes) from the body of the current one."""
        if view.nbytes > len(self._left):
            raise ProtocolError(f"a body ends after {len(self._left)} of {view.nbytes} bytes.")
        view[:], self._left = self._left[: view.nbytes], self._left[view.nbytes :]

    def read_body(self, num_bytes: int, **_: Any) -> bytes:
        """A part of it, whole."""
        data = bytearray(num_bytes)
        self.read_into(memoryview(data))
        return bytes(data)

    def readable(self) -> bool:
        """Never: the driver has nothing to add."""
        return False

    def try_send(self, *_: Any) -> None:
        """A sign of life."""
        self._beat()

    def stream(self, kind: str, header: dict[str, Any] | None, _bytes: int, pieces: Iterable[Buffer], **_: Any) -> None:
        """Keep a frame whose body is made piece by piece."""
        self.send(kind, header, *pieces)

    def send(self, kind: str, header: dict[str, Any] | None = None, *bodies: Buffer, **_: Any) -> None:
        """Keep what the replica says."""
        if kind == "log":
            self.lines += [str((header or {})["text"])[:_MAX_LINE]] if len(self.lines) < _MAX_LINES else []
            return
        self.said[kind] = header or {}
        self.bodies = bodies or self.bodies
        if kind == "hello":
            self._admit(parse(Hello, self.said[kind]))
            return
        if kind == "opened" and self._job.durable and self.said[kind]["state"] == "reset":
            hello = parse(Hello, self.said["hello"])
            raise ReplicaLostError(
                f"the state of replica {hello.replica} after round {self._job.opening.committed} is gone with its executor; "
                "going back to the last durable snapshot.",
                replica=hello.replica,
                host=hello.host,
            )
        self._beat()

    def _admit(self, hello: Hello) -> None:
        if hello.shard:
            raise ShardLostError(
                f"replica {hello.replica} on {hello.host}: {hello.shard}", replica=hello.replica, host=hello.host
            )
        check_versions(self._job.versions, [hello])
        check_shard(hello, self._job.facts[hello.replica])

    def close(self) -> None:
        """Nothing is open."""
