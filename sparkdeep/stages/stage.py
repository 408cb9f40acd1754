"""The driver's end of one open stage: replicas come in, rounds go out, every wait has a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar, final

from sparkdeep.errors import ProtocolError, ReplicaLostError, SparkdeepError
from sparkdeep.protocol.messages import Hello, Open, Opened, RoundSpec, parse, to_header
from sparkdeep.protocol.orders import Globals, Order, RoundResult, RoundWork
from sparkdeep.protocol.wire import Connection, ConnectionLostError, SilentError
from sparkdeep.stages.collector import Collector, Plane, Round
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.stages.gathering import Gathering
from sparkdeep.stages.ring import Meeting, Trial, measure
from sparkdeep.stages.staffing import RunningStage
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import pack_tensors, unpack_dict

__all__ = ["Stage"]

_ALIVE_EVERY_S = 5.0
_REASON_S = 10.0
_LAST_WORDS_S = 2.0
_ASK_EVERY_S = 1.0
_SHORT_S = 5.0

_T = TypeVar("_T")


class _AbortedError(Exception):
    """Another replica failed; this thread gives up."""


@final
class Stage:
    """N replicas at the other end of N connections.

    Args:
        run, name: what a hello must carry.
        num_replicas: how many are awaited.
        plane: how parameters travel.
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
        plane: Plane,
        stall_timeout_s: float,
        on_beat: Callable[[int, int], None],
        on_log: Callable[[int, str], None],
    ) -> None:
        self.name = name
        self.num_replicas = num_replicas
        self._run = run
        self._plane = plane
        self.collector: Callable[[Round], Collector] = plane.collector
        """What its rounds are collected by: `Ring`, once a ring was formed and chosen."""
        self._fresh = True
        self._held = False
        self._stall_s = stall_timeout_s
        self._on_beat = on_beat
        self._on_log = on_log
        self._arrived = threading.Condition()
        self._links: dict[int, DriverLink] = {}
        self.hellos: dict[int, Hello] = {}
        self._aborted = threading.Event()
        self._running: RunningStage | None = None
        self._pool = ThreadPoolExecutor(num_replicas, thread_name_prefix=f"sparkdeep-{name}")
        self._alive = threading.Thread(target=self._stay_alive, name="sparkdeep-alive", daemon=True)

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
            self._links[hello.replica] = DriverLink(
                hello, connection, stall_timeout_s=self._stall_s, on_beat=self._on_beat, on_log=self._on_log
            )
            self.hellos[hello.replica] = hello
            self._arrived.notify_all()

    def gather(
        self,
        running: RunningStage,
        *,
        timeout_s: float,
        waiting_for: Callable[[], str],
        enough: Callable[[], bool] = lambda: True,
    ) -> list[Hello]:
        """Wait for every replica's hello.

        Args:
            running: the stage.
            timeout_s: for all of them.
            waiting_for: what may be in the way, for the message.
            enough: whether there are still slots for all. Spark lets a stage that was submitted wait without limit.

        Raises:
            ReplicaLostError: not all came within `timeout_s`, or the stage failed.
            SparkdeepError: the stage failed for a reason that repeating it does not mend.
        """
        self._running = running
        self._alive.start()
        deadline = time.monotonic() + timeout_s
        asked = had = time.monotonic()
        with self._arrived:
            while len(self.hellos) < self.num_replicas:
                self._arrived.wait(timeout=0.1)
                if (now := time.monotonic()) - asked > _ASK_EVERY_S:
                    asked = now
                    had = now if enough() else had
                    if now - had > _SHORT_S:
                        raise ReplicaLostError(f"slots went away while the stage waited. {waiting_for()}")
                if (failure := running.failure()) is not None:
                    raise _lost(failure)
                if time.monotonic() > deadline:
                    missing = sorted(set(range(self.num_replicas)) - self.hellos.keys())
                    raise ReplicaLostError(
                        f"replicas {missing} of {self.num_replicas} did not come within open_timeout_s={timeout_s:g} s. "
                        f"{waiting_for()}"
                    )
        return [self.hellos[i] for i in range(self.num_replicas)]

    def open(self, answers: Sequence[tuple[Open, bytes, bytes]], *, timeout_s: float) -> list[str]:
        """Answer every hello with its `Open`, the module's tensors and its state; returns what became of each state."""

        def welcome(replica: int) -> str:
            answer, tensors, state = answers[replica]
            link = self._links[replica]
            link.send("open", to_header(answer), tensors, state)
            return parse(Opened, link.expect("opened", timeout_s=timeout_s).header).state

        return self._all(welcome)

    def try_both(self, num_bytes: int) -> Trial:
        """Measure the star and the ring, which must have been formed, with up to `num_bytes` a replica."""
        return measure(num_bytes, lambda work: self._all(lambda replica: work(self._links[replica])))

    def form_ring(self, *, timeout_s: float) -> None:
        """Have the replicas connect to each other; updates are then added up among them.

        Raises:
            ReplicaLostError: they cannot reach each other.
        """
        meeting = Meeting(timeout_s=timeout_s, check=self._check)
        self._all(lambda replica: meeting.host(self._links[replica], self.num_replicas))

    def close(self, *, save: int | None, clocks: Sequence[int], timeout_s: float = 60.0) -> None:
        """Tell the replicas to stop, to keep their state as that of round `save` if it is given, and wait for them.

        Args:
            save: a round, or None.
            clocks: steps of every replica's learning-rate schedule.
            timeout_s: for their tasks to end.
        """

        def farewell(replica: int) -> None:
            link = self._settled(replica)
            link.send("stop", {"save": save, "clock": clocks[replica]})
            link.expect("bye")

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
            for link in self._links.values():
                link.connection.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- rounds --------------------------------------------------------------------------------------------------

    def train(self, work: RoundWork, start: Globals, ahead: RoundSpec | None = None) -> RoundResult:
        """Run one round: the updates that it counts are in the result, or it raises and none counts.

        Args:
            work: of the round.
            start: what it starts from.
            ahead: the next round, if replicas may begin it before this one's mean is taken (`overlap`).

        Raises:
            NonFiniteError, UserCodeError: never mended by repeating.
            ReplicaLostError: a replica went away or its update was damaged; the round can be repeated.
        """
        began = time.perf_counter()
        given = Round(
            plane=self._plane,
            work=work,
            start=start,
            ahead=ahead,
            fresh=self._fresh,
            held=self._held,
            num_replicas=self.num_replicas,
            check=self._check,
        )
        gathering = Gathering(given, self.collector(given))
        self._all(lambda replica: gathering.exchange(replica, self._links[replica]))
        self._fresh, self._held = False, gathering.held
        hosts = [self.hellos[i].host for i in range(self.num_replicas)]
        return replace(gathering.result(time.perf_counter() - began), hosts=hosts)

    def evaluate(self, model: Globals) -> list[dict[str, Any]]:
        """Score the global parameters on every replica's validation rows; one result a replica, in order."""
        buffers = pack_tensors(model.buffers)
        header = to_header(Order(buffer_bytes=len(buffers)))

        def score(replica: int) -> dict[str, Any]:
            link = self._settled(replica)
            link.send("evaluate", header, raw_bytes(model.parameters), buffers)
            return unpack_dict(link.answer("scores"))

        return self._all(score)

    def states(self, clocks: Sequence[int]) -> list[bytes]:
        """Every replica's optimizer, clock and random state; `clocks`: steps of their learning-rate schedules."""

        def ask(replica: int) -> bytes:
            link = self._settled(replica)
            link.send("state", to_header(Order(clock=clocks[replica])))
            return link.answer("state")

        return self._all(ask)

    def kept_rounds(self) -> dict[int, int]:
        """Replica -> the last round of this stage after which its state is known to be kept."""
        return {i: link.kept_round for i, link in self._links.items() if link.kept_round is not None}

    def _settled(self, replica: int) -> DriverLink:
        """A replica's link, once it has gone back to where a round that it was too late for began."""
        link = self._links[replica]
        link.begin_round(None)
        link.settle(lambda: False)
        return link

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
        # A replica's own words come before a dead link, and what repeating cannot mend before what it can.
        for error in errors.values():
            if not isinstance(error, ConnectionLostError | ReplicaLostError):
                return error
        for error in errors.values():
            if isinstance(error, ReplicaLostError):
                return error
        # Spark often knows better why a link went dead; of a replica that is merely silent it knows nothing.
        silent = all(isinstance(error, SilentError) for error in errors.values())
        deadline = time.monotonic() + (0.0 if silent else _REASON_S)
        while failure is None and time.monotonic() < deadline:
            assert self._running is not None
            failure = self._running.failure()
            time.sleep(0.05)
        if isinstance(failure, SparkdeepError) and not isinstance(failure, ConnectionLostError):
            if isinstance(failure, ReplicaLostError) and failure.replica in self.hellos:
                failure.host = failure.host or self.hellos[failure.replica].host
            return failure
        for replica, error in errors.items():
            return ReplicaLostError(
                f"{self._links[replica].who} was lost: {error}{f' ({failure})' if failure else ''}",
                replica=replica,
                host=self.hellos[replica].host,
            )
        assert failure is not None
        return _lost(failure)

    def _check(self) -> None:
        if self._aborted.is_set():
            raise _AbortedError

    def _stay_alive(self) -> None:
        while not self._aborted.wait(timeout=_ALIVE_EVERY_S):
            for link in list(self._links.values()):
                try:
                    if link.waiting:
                        link.connection.try_send("alive")
                except (ConnectionLostError, _AbortedError):
                    continue  # whoever reads from this connection next reports it


def _lost(failure: BaseException) -> BaseException:
    """A launcher's failure as one of ours; what has a name keeps it."""
    if isinstance(failure, SparkdeepError) and not isinstance(failure, ConnectionLostError):
        return failure
    return ReplicaLostError(f"the stage failed: {type(failure).__name__}: {failure}")
