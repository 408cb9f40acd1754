"""A replica's life in one job: that of a stage by letter, with one order; its reply is what it said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Final, final

from sparkdeep.errors import NonFiniteError, ProtocolError, ReplicaLostError, ShardLostError
from sparkdeep.models.packing import unpack_program
from sparkdeep.models.program import Program
from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.exchange import Exchange
from sparkdeep.protocol.messages import Failure, Hello, ReplicaPlan, Update, parse, to_header
from sparkdeep.protocol.orders import Job, Reply
from sparkdeep.protocol.refusals import check_shard, check_updates, check_versions, failed
from sparkdeep.protocol.wire import Buffer, Frame
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.stage import Place, live
from sparkdeep.storage.disks import StateFiles, own_files
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import pack_tensors

__all__ = ["Letter", "obey"]

_MAX_LINES: Final = 500
_MAX_LINE: Final = 2000


@final
class Letter:
    """Stands for the connection where a job gives one order: what the driver would refuse is refused here.

    The driver's words were all written beforehand, and the replica's are kept for its reply.

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


def obey(
    job: Job,
    place: Place,
    letter: Letter,
    *,
    open_program: Callable[[bytes], Program] = unpack_program,
    check: Callable[[], None] = lambda: None,
) -> Reply:
    """Do what the job's order says.

    Args:
        job: the order, and what the replica is made from.
        place: where it is.
        letter: of the job.
        open_program: makes the user's objects.
        check: called while the first replica waits for the updates of others; raises to give up.

    Raises:
        UserCodeError: the user's model, loss or callable raised.
        ReplicaLostError: the environment failed; the order can be repeated.
        ShardLostError, ShardMismatchError, VersionMismatchError: this is not the replica that was meant.
    """
    header: dict[str, Any] = {"job": job.name, "replica": place.replica}
    if job.kind == "state" and not place.problem:  # which needs no model
        with own_files("it read the replica's state"):
            data = StateFiles(place.state_dir, job.name).read(job.opening.kept_round, job.opening.kept_by)
        return Reply(header=header, bodies=(data,))

    def plan() -> ReplicaPlan:
        assert job.program is not None
        return ReplicaPlan(program=bytes(job.program.open()), settings=job.settings, schema=job.schema)

    try:
        replica = live(ReplicaLink(letter), place, run=job.run, stage=job.name, plan=plan, open_program=open_program)
    except Exception as error:
        failure = letter.said.get("error")
        if failure is None or failure["cause"] != "user":
            raise
        raise failed(parse(Failure, failure), parse(Hello, letter.said["hello"])) from error
    header |= letter.said
    if job.exchange is None:
        return Reply(header=header, bodies=letter.bodies)
    assert replica is not None, "a letter lets in no replica without a shard"
    exchange = Exchange(job.exchange, job.run, job.name)
    exchange.put(place.replica, place.host, parse(Update, header["update"]), b"".join(letter.bodies))
    if place.replica != 0:
        return Reply(header=header)
    return _averaged(exchange, job, letter, replica, header, check)


def _averaged(
    exchange: Exchange,
    job: Job,
    letter: Letter,
    replica: Replica,
    header: dict[str, Any],
    check: Callable[[], None],
) -> Reply:
    """The first replica's reply: it has the mean of all updates that are laid down as its body."""

    def watch() -> None:
        letter.try_send("beat")
        check()

    updates, hosts = exchange.headers(len(job.facts), timeout_s=job.timeout_s, check=watch)
    try:
        check_updates(updates, hosts, header["update"]["round"])
    except NonFiniteError:
        return Reply(header=header)  # the driver sees the same headers, and refuses the round by name
    if not any(update.weight for update in updates):
        return Reply(header=header)
    codec = codec_named(job.settings.codec)
    averaging = Averaging(layout=replica.layout, codec=codec, wide=job.wide, pooling=replica.pooling())
    known = replica.exchange.known
    vector, pooled = averaging.mean(
        updates,
        lambda i: exchange.body(i, averaging.body_bytes(updates[i])),
        known if averaging.codec.lossy else None,
        replica.begun,
    )
    letter.try_send("beat")
    narrow = vector.to(replica.layout.dtype)
    buffers = pack_tensors(pooled)
    stored = exchange.put_mean(b"".join([raw_bytes(narrow), buffers]))
    exchange.sweep(job.stale)
    header["mean"] = asdict(stored)
    return Reply(header=header, bodies=(raw_bytes(vector if job.wide else narrow), buffers))
