"""Which fits of this driver hold how many of a session's slots; a fit that finds too few free waits for its turn."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, final

from pyspark.sql import SparkSession

from sparkdeep.errors import PreflightError
from sparkdeep.spark.session.access import access_to

__all__ = ["Courtesy", "Lease", "SlotLedger", "ledger_of"]

_LOG = logging.getLogger("sparkdeep")
_LOOK_EVERY_S: Final = 1.0
_COURTESY_S: Final = 5.0

_ledgers: dict[str, SlotLedger] = {}
_ledgers_lock = threading.Lock()


@final
@dataclass(kw_only=True, eq=False)
class Lease:
    """The slots that one fit holds from before its ingest until it ends."""

    name: str
    """The fit, for messages."""
    num_workers: int
    """Its replicas."""
    share: Fraction
    """Of all slots. A share, since stages of other resource profiles count slots of another size."""
    parent: Lease | None
    """The fit in whose callback this one runs; its slots are lent to this one."""
    clock: Callable[[], float]
    began: float = 0.0
    seen: float = 0.0
    """When it last gave a sign of life."""
    lent: bool = True
    """Whether no stage of it is open, so that a fit which one of its callbacks starts may use its slots."""
    thread: int = field(default_factory=threading.get_ident)

    def alive(self) -> None:
        """Give a sign of life: those who wait for these slots go on waiting."""
        self.seen = self.clock()

    @property
    def extra(self) -> Fraction:
        """What it holds beyond what its parent lent."""
        return self.share if self.parent is None else max(Fraction(0), self.share - self.parent.share)


@final
class SlotLedger:
    """Gives a session's slots to fits, first come, first served.

    Spark starts a barrier stage only when all its slots are free at once, and knows nothing of fits: the stages of two
    fits that do not fit side by side would take turns, each waiting for the other to close, until one gives up.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._held: list[Lease] = []
        self._queue: list[Lease] = []

    @contextmanager
    def hold(self, name: str, num_workers: int, slots: Callable[[], int], *, timeout_s: float) -> Iterator[Lease]:
        """Wait for `num_workers` slots, hold them, and give them back whatever happens.

        Args:
            name: of the fit, for messages.
            num_workers: its replicas.
            slots: tells how many tasks of its resource profile can run at once, busy or not.
            timeout_s: how long to wait while no fit that holds slots gives a sign of life.

        Raises:
            PreflightError: nothing was heard from the fits that hold the slots for `timeout_s`, or they are held by a fit
                that waits for this one.
        """
        lease = self._take(name, num_workers, slots, timeout_s)
        try:
            yield lease
        finally:
            with self._changed:
                self._held.remove(lease)
                self._changed.notify_all()

    def _take(self, name: str, num_workers: int, slots: Callable[[], int], timeout_s: float) -> Lease:
        with self._changed:
            mine = [held for held in self._held if held.thread == threading.get_ident()]
            parent = mine[-1] if mine and mine[-1].lent else None
            lease = Lease(
                name=name,
                num_workers=num_workers,
                share=_share(num_workers, slots()),
                parent=parent,
                clock=self._clock,
            )
            # A fit within a callback goes first: the one around it holds its slots until this one ends.
            self._queue.insert(0 if mine else len(self._queue), lease)
            try:
                self._wait(lease, mine, slots, timeout_s)
            finally:
                self._queue.remove(lease)
                self._changed.notify_all()
            lease.began = lease.seen = self._clock()
            self._held.append(lease)
            return lease

    def _wait(self, lease: Lease, mine: list[Lease], slots: Callable[[], int], timeout_s: float) -> None:
        blocked = sum(held.extra for held in mine if not held.lent)
        if lease.extra + blocked > 1:
            raise PreflightError(
                f"{lease.name} needs {lease.num_workers} of {slots()} slots, and was started from a callback of a fit whose "
                f"stage holds them meanwhile: {self._holders()}. Give that callback the attribute needs_spark = True, so "
                "that the stage is closed while it runs, or start this fit after the other."
            )
        asked = self._clock()
        announced = False
        while not self._fits(lease):
            if not announced:
                _LOG.info("%s waits for %d slots; they are held by %s", lease.name, lease.num_workers, self._holders())
                announced = True
            heard = max([asked, *(held.seen for held in self._held)])
            if self._clock() - heard > timeout_s:
                raise PreflightError(
                    f"{lease.name} waited {self._clock() - asked:.0f} s for {lease.num_workers} of {slots()} slots, and the "
                    f"fits that hold them gave no sign of life for {timeout_s:g} s: {self._holders()}. End those, give the "
                    "session more executors, run one fit at a time (parallelism=1), or raise open_timeout_s."
                )
            self._changed.wait(timeout=min(_LOOK_EVERY_S, timeout_s))
            lease.share = _share(lease.num_workers, slots())  # executors come and go

    def _fits(self, lease: Lease) -> bool:
        free = sum((held.extra for held in self._held), lease.extra) <= 1
        return lease.extra == 0 or (self._queue[0] is lease and free)

    def _holders(self) -> str:
        now = self._clock()
        held = [f"{h.name} ({h.num_workers} slots since {now - h.began:.0f} s)" for h in self._held]
        ahead = [h.name for h in self._queue[:-1]]
        return ", ".join(held) + (f"; before it come {', '.join(ahead)}" if ahead else "")


def _share(num_workers: int, slots: int) -> Fraction:
    # Fewer slots than workers, while an executor is replaced, is a matter of the stage's own deadline.
    return min(Fraction(1), Fraction(num_workers, max(1, slots)))


def ledger_of(session: str) -> SlotLedger:
    """The ledger of a session in this process, by the id of its application."""
    with _ledgers_lock:
        return _ledgers.setdefault(session, SlotLedger())


@final
class Courtesy:
    """Tells when to close an open stage between two rounds because other Spark jobs get no slot.

    A job that was seen without a running task in two looks, a second apart, is let through; at most every few seconds,
    so that a job that no slot of the session can ever run costs a few percent of the time and not all of it.
    """

    def __init__(self, spark: SparkSession) -> None:
        self._access = access_to(spark)
        self._waiting: set[int] = set()
        self._looked = self._closed = time.monotonic()

    def asks(self) -> bool:
        """Whether the stage should close now; the caller closes it then."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return False
        self._looked = now
        waiting = self._access.starving()
        again, self._waiting = waiting & self._waiting, waiting
        if not again or now - self._closed < _COURTESY_S:
            return False
        self._closed = now
        return True
