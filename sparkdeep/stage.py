"""The driver's end of one open stage: replicas come in, rounds go out, every wait has a deadline."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from sparkdeep.admission import Admission
from sparkdeep.averaging import OrderedSum, pool_buffers
from sparkdeep.errors import ProtocolError, ReplicaLostError, SparkdeepError, UserCodeError
from sparkdeep.launch import RunningStage
from sparkdeep.messages import Failure, Hello, Open, Opened, Update, parse, to_header
from sparkdeep.parameters import Layout, raw_bytes
from sparkdeep.schedule import RoundSpec
from sparkdeep.trees import pack_tensors, unpack, unpack_tensors
from sparkdeep.wire import Connection, ConnectionLostError, Frame

__all__ = ["Globals", "RoundResult", "Stage"]

_ALIVE_EVERY_S = 5.0
_MAX_STATE_BYTES = 1 << 36
_REASON_S = 10.0
_LAST_WORDS_S = 2.0

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Globals:
    """What every replica starts a round from."""

    parameters: Tensor
    """(numel,) in the layout's dtype."""
    buffers: dict[str, Tensor]
    sections: list[str]
    """Names of averaged optimizer state, with `inner_state="average"`."""
    inner: Tensor
    """(len(sections) * numel,)."""


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """The mean of one round."""

    mean: Tensor
    """(numel,) float64."""
    buffers: dict[str, Tensor]
    sections: list[str]
    inner: Tensor
    """(len(sections) * numel,) float64: mean of the optimizer states."""
    loss: float
    updates: list[Update]
    seconds: float


class _AbortedError(Exception):
    """Another replica failed; this thread gives up."""


@final
class Stage:
    """N replicas at the other end of N connections.

    Args:
        run, name: what a hello must carry.
        num_replicas: how many are awaited.
        layout: of the model.
        stall_timeout_s: a replica that sends nothing for this long while it works counts as lost.
        on_beat: called with (replica, rows of the round so far).
        on_log: called with (replica, line) for what replicas print.
    """

    def __init__(
        self,
        *,
        run: str,
        name: str,
        num_replicas: int,
        layout: Layout,
        stall_timeout_s: float,
        on_beat: Callable[[int, int], None],
        on_log: Callable[[int, str], None],
    ) -> None:
        self.name = name
        self.num_replicas = num_replicas
        self._run = run
        self._layout = layout
        self._stall_s = stall_timeout_s
        self._on_beat = on_beat
        self._on_log = on_log
        self._arrived = threading.Condition()
        self._connections: dict[int, Connection] = {}
        self.hellos: dict[int, Hello] = {}
        self._waiting: set[int] = set()
        self._aborted = threading.Event()
        self._running: RunningStage | None = None
        self._pool = ThreadPoolExecutor(num_replicas, thread_name_prefix=f"sparkdeep-{name}")
        self._alive = threading.Thread(target=self._stay_alive, name="sparkdeep-alive", daemon=True)

    # -- opening and closing ---------------------------------------------------------------------------------------

    def admit(self, hello: Hello, connection: Connection) -> None:
        """Take in a replica.

        Raises:
            ProtocolError: it belongs to another run or an earlier stage, or its place is taken.
        """
        if (hello.run, hello.stage) != (self._run, self.name):
            raise ProtocolError(f"stage {hello.stage!r} of run {hello.run!r} is over.")
        with self._arrived:
            if not 0 <= hello.replica < self.num_replicas or hello.replica in self.hellos or self._aborted.is_set():
                raise ProtocolError(f"there is no place for replica {hello.replica}.")
            connection.check = self._check
            self._connections[hello.replica] = connection
            self.hellos[hello.replica] = hello
            self._waiting.add(hello.replica)
            self._arrived.notify_all()

    def gather(self, running: RunningStage, *, timeout_s: float, waiting_for: Callable[[], str]) -> list[Hello]:
        """Wait for every replica's hello.

        Raises:
            ReplicaLostError: not all came within `timeout_s`, or the stage failed.
            SparkdeepError: the stage failed for a reason that repeating it does not mend.
        """
        self._running = running
        self._alive.start()
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while len(self.hellos) < self.num_replicas:
                self._arrived.wait(timeout=0.1)
                if (failure := running.failure()) is not None:
                    raise _lost(failure)
                if time.monotonic() > deadline:
                    missing = sorted(set(range(self.num_replicas)) - self.hellos.keys())
                    raise ReplicaLostError(
                        f"replicas {missing} of {self.num_replicas} did not come within open_timeout_s={timeout_s:g} s. "
                        f"{waiting_for()}"
                    )
        return [self.hellos[i] for i in range(self.num_replicas)]

    def open(self, answers: Sequence[tuple[Open, bytes, bytes]]) -> list[str]:
        """Answer every hello with its `Open`, the module's tensors and its state; returns what became of each state."""

        def welcome(replica: int) -> str:
            answer, tensors, state = answers[replica]
            connection = self._connections[replica]
            connection.send("open", to_header(answer), tensors, state, timeout_s=self._stall_s)
            return parse(Opened, self._expect(replica, "opened").header).state

        return self._all(welcome)

    def close(self, *, save: int | None, timeout_s: float = 60.0) -> None:
        """Tell the replicas to stop, to keep their state as that of round `save` if it is given, and wait for them."""

        def farewell(replica: int) -> None:
            self._connections[replica].send("stop", {"save": save})
            self._expect(replica, "bye")

        self._all(farewell)
        self._hang_up()
        assert self._running is not None
        self._running.finish(timeout_s)

    def abort(self) -> None:
        """End the stage at once, whatever it does; idempotent."""
        self._hang_up()
        if self._running is not None:
            self._running.cancel()

    def _hang_up(self) -> None:
        self._aborted.set()
        with self._arrived:
            for connection in self._connections.values():
                connection.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- rounds --------------------------------------------------------------------------------------------------

    def train(self, spec: RoundSpec, start: Globals) -> RoundResult:
        """Run one round: all replicas' updates are in the result, or it raises and none counts.

        Raises:
            NonFiniteError, UserCodeError: never mended by repeating.
            ReplicaLostError: a replica went away or its update was damaged; the round can be repeated.
        """
        began = time.perf_counter()
        buffers = pack_tensors(start.buffers)
        header = {"spec": asdict(spec), "sections": start.sections, "buffer_bytes": len(buffers)}
        admission = Admission(self.num_replicas, self._layout, self._check, spec.round)
        received: dict[int, dict[str, Tensor]] = {}

        def exchange(replica: int) -> None:
            connection = self._connections[replica]
            connection.send(
                "train", header, raw_bytes(start.parameters), raw_bytes(start.inner), buffers, timeout_s=self._stall_s
            )
            update = parse(Update, self._expect(replica, "update").header)
            self._waiting.add(replica)
            total = admission.enter(replica, self.hellos[replica].host, update)
            self._waiting.discard(replica)
            connection.send("send")
            if update.weight > 0:
                received[replica] = self._receive(replica, update, total, len(buffers))
            self._expect(replica, "saved")
            self._waiting.add(replica)

        self._waiting.clear()
        self._all(exchange)
        updates = admission.updates
        weights = [update.weight for update in updates]
        total_weight = sum(weights)
        mean = admission.total.mean() if total_weight else start.parameters.to(torch.float64)
        pooled = start.buffers
        if total_weight:
            buffers_of = [received.get(i, start.buffers) for i in range(self.num_replicas)]
            pooled = pool_buffers(buffers_of, weights, self._layout.variance_of)
        return RoundResult(
            mean=mean[: self._layout.numel],
            buffers=pooled,
            sections=admission.sections,
            inner=mean[self._layout.numel :],
            loss=sum(update.loss_sum for update in updates) / total_weight if total_weight else float("nan"),
            updates=updates,
            seconds=time.perf_counter() - began,
        )

    def evaluate(self, model: Globals) -> list[dict[str, Any]]:
        """Score the global parameters on every replica's validation rows; one result a replica, in order."""
        buffers = pack_tensors(model.buffers)
        header = {"sections": [], "buffer_bytes": len(buffers)}

        def score(replica: int) -> dict[str, Any]:
            connection = self._connections[replica]
            connection.send("evaluate", header, raw_bytes(model.parameters), buffers, timeout_s=self._stall_s)
            return dict(unpack(self._small_body(replica, "scores")))

        return self._all(score)

    def states(self) -> list[bytes]:
        """Every replica's optimizer, clock and random state."""

        def ask(replica: int) -> bytes:
            self._connections[replica].send("state")
            return self._small_body(replica, "state")

        return self._all(ask)

    # -- one replica's side of it ----------------------------------------------------------------------------------

    def _expect(self, replica: int, kind: str) -> Frame:
        connection = self._connections[replica]
        while True:
            frame = connection.receive(timeout_s=self._stall_s)
            if frame.kind == kind:
                return frame
            if frame.body_bytes:
                raise ProtocolError(f"replica {replica} sent {frame.kind!r} with a body; expected {kind!r}.")
            if frame.kind == "beat":
                self._on_beat(replica, int(frame.header.get("rows", 0)))
            elif frame.kind == "log":
                self._on_log(replica, str(frame.header.get("text", "")))
            elif frame.kind == "error":
                raise self._failed(replica, parse(Failure, frame.header))
            else:
                raise ProtocolError(f"replica {replica} sent {frame.kind!r}; expected {kind!r}.")

    def _small_body(self, replica: int, kind: str) -> bytes:
        self._waiting.discard(replica)
        frame = self._expect(replica, kind)
        data = self._connections[replica].read_body(
            frame.body_bytes, limit_bytes=_MAX_STATE_BYTES, timeout_s=self._stall_s
        )
        self._waiting.add(replica)
        return data

    def _receive(self, replica: int, update: Update, total: OrderedSum, own_buffer_bytes: int) -> dict[str, Tensor]:
        """Add one update's body to the sum as it arrives; returns its buffers."""
        connection = self._connections[replica]
        frame = self._expect(replica, "body")
        vector_bytes = total.numel * self._layout.dtype.itemsize
        if frame.body_bytes != vector_bytes + update.buffer_bytes or update.buffer_bytes > 2 * own_buffer_bytes + 4096:
            raise ProtocolError(
                f"replica {replica} announced a body of {frame.body_bytes} bytes; expected {vector_bytes} of "
                f"parameters and {own_buffer_bytes} of buffers."
            )
        chunk = torch.empty(min(total.chunk, total.numel), dtype=self._layout.dtype)
        crc = 0

        def chunks(start: int, stop: int) -> Tensor:
            nonlocal crc
            part = chunk[: stop - start]
            view = raw_bytes(part)
            connection.read_into(view, timeout_s=self._stall_s)
            crc = zlib.crc32(view, crc)
            return part

        total.add(replica, chunks, self._check)
        buffers = connection.read_body(
            update.buffer_bytes, limit_bytes=2 * own_buffer_bytes + 4096, timeout_s=self._stall_s
        )
        if zlib.crc32(buffers, crc) != update.crc32:
            raise ReplicaLostError(
                f"the update of {self._who(replica)} was damaged on its way (checksum differs); the round is void.",
                replica=replica,
                host=self.hellos[replica].host,
            )
        return unpack_tensors(buffers)

    # -- all replicas at once ----------------------------------------------------------------------------------------

    def _all(self, work: Callable[[int], _T]) -> list[_T]:
        """Run `work` for every replica; when one fails, the others give up and the root cause is raised."""
        futures: list[Future[_T]] = [self._pool.submit(work, i) for i in range(self.num_replicas)]
        failure: BaseException | None = None
        try:
            pending: set[Future[_T]] = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                if any(f.exception() is not None for f in done):
                    break
                assert self._running is not None
                if pending and (failure := self._running.failure()) is not None:
                    # The launcher was faster than the replica's own words, which say more: who, where, and whether
                    # repeating can help.
                    wait(pending, timeout=_LAST_WORDS_S, return_when=FIRST_EXCEPTION)
                    break
            else:
                return [f.result() for f in futures]
        except BaseException:
            self._aborted.set()  # KeyboardInterrupt, for one: the threads must not wait for it
            raise
        self._aborted.set()
        wait(futures)
        raise self._root_cause(futures, failure)

    def _root_cause(self, futures: Sequence[Future[Any]], failure: BaseException | None) -> BaseException:
        errors = {i: e for i, f in enumerate(futures) if (e := f.exception()) and not isinstance(e, _AbortedError)}
        # A replica's own words come before a dead line, and what repeating cannot mend before what it can.
        for error in errors.values():
            if not isinstance(error, ConnectionLostError | ReplicaLostError):
                return error
        for error in errors.values():
            if isinstance(error, ReplicaLostError):
                return error
        deadline = time.monotonic() + _REASON_S
        while failure is None and time.monotonic() < deadline:  # Spark often knows better why a line went dead
            assert self._running is not None
            failure = self._running.failure()
            time.sleep(0.05)
        if isinstance(failure, SparkdeepError) and not isinstance(failure, ConnectionLostError):
            return failure
        for replica, error in errors.items():
            return ReplicaLostError(
                f"{self._who(replica)} was lost: {error}{f' ({failure})' if failure else ''}",
                replica=replica,
                host=self.hellos[replica].host,
            )
        assert failure is not None
        return _lost(failure)

    def _failed(self, replica: int, failure: Failure) -> SparkdeepError:
        who = self._who(replica)
        host = self.hellos[replica].host
        if failure.cause == "user":
            return UserCodeError(
                f"{failure.traceback.rstrip()}\n\n{failure.message}\n(raised on {who}, in {failure.where}; not retried)",
                replica=replica,
                host=host,
                traceback_text=failure.traceback,
            )
        if failure.cause == "lost":
            text = f"{who} failed in {failure.where}: {failure.message}\n{failure.traceback.rstrip()}"
            return ReplicaLostError(text, replica=replica, host=host)
        return SparkdeepError(f"{who} failed in {failure.where}: {failure.message}\n{failure.traceback}")

    def _who(self, replica: int) -> str:
        hello = self.hellos[replica]
        return f"replica {replica} on {hello.host} (process {hello.pid})"

    def _check(self) -> None:
        if self._aborted.is_set():
            raise _AbortedError

    def _stay_alive(self) -> None:
        while not self._aborted.wait(timeout=_ALIVE_EVERY_S):
            for replica in list(self._waiting):
                try:
                    self._connections[replica].try_send("alive")
                except (ConnectionLostError, _AbortedError):
                    continue  # whoever reads from this connection next reports it


def _lost(failure: BaseException) -> BaseException:
    """A launcher's failure as one of ours; what has a name keeps it."""
    if isinstance(failure, SparkdeepError) and not isinstance(failure, ConnectionLostError):
        return failure
    return ReplicaLostError(f"the stage failed: {type(failure).__name__}: {failure}")
