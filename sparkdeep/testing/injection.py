"""Faults on purpose: each happens at its place in a fit exactly once, in whichever process gets there first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

from sparkdeep import seams
from sparkdeep.errors import ReplicaLostError
from sparkdeep.seams import Buffer, Phase

__all__ = ["Fault", "Injector"]

Kind: TypeAlias = Literal["fail", "delay", "corrupt", "kill", "call"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is to happen."""

    number: int
    """In the order of planning; of two faults for the same place the lower one happens first."""
    kind: Kind
    phase: Phase
    round: int | None
    """None: in any round."""
    replica: int | None
    """None: on any replica, or on the driver."""
    value: Any = None
    """The error to raise, the seconds to wait, the signal to send or the function to call."""

    def matches(self, phase: Phase, round_number: int, replica: int | None) -> bool:
        """Whether this is its place."""
        return (
            phase == self.phase
            and self.round in {None, round_number}
            and (self.replica is None or self.replica == replica)
        )


@final
class Injector:
    """Plans faults, makes them happen, and knows which have happened.

    `carrier` pickles it into replicas. Processes that share `folder` share what has happened: each fault leaves a
    file there before it strikes, so that it strikes once, however often its round is repeated.

    Args:
        folder: empty or absent, and seen by all processes; once it is removed nothing happens any more.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.faults: list[Fault] = []

    # -- planning ------------------------------------------------------------------------------------------------

    def fail_at(
        self, phase: Phase, round: int | None = None, replica: int | None = None, *, error: Exception | None = None
    ) -> Injector:
        """Raise `error`; by default what sparkdeep itself raises where an executor fails."""
        return self._plan("fail", phase, round, replica, error or ReplicaLostError(f"injected in {phase}"))

    def delay_at(
        self, phase: Phase, round: int | None = None, replica: int | None = None, *, seconds: float
    ) -> Injector:
        """Wait."""
        return self._plan("delay", phase, round, replica, seconds)

    def corrupt_at(self, phase: Phase, round: int | None = None, replica: int | None = None) -> Injector:
        """Flip a bit of the first bytes that pass by."""
        return self._plan("corrupt", phase, round, replica, None)

    def kill_at(
        self, phase: Phase, round: int | None = None, replica: int | None = None, *, signum: int = signal.SIGKILL
    ) -> Injector:
        """Send a signal to the process that gets there."""
        return self._plan("kill", phase, round, replica, int(signum))

    def call_at(
        self, phase: Phase, round: int | None = None, replica: int | None = None, *, action: Callable[[], Any]
    ) -> Injector:
        """Call a function; one that is to happen on an executor must be picklable."""
        return self._plan("call", phase, round, replica, action)

    def _plan(self, kind: Kind, phase: Phase, round_number: int | None, replica: int | None, value: Any) -> Injector:
        self.faults.append(
            Fault(number=len(self.faults), kind=kind, phase=phase, round=round_number, replica=replica, value=value)
        )
        return self

    # -- at work -------------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[Injector]:
        """Install this as the process's hook; replicas that are processes of their own need `carrier` as well."""
        before = seams.installed()
        seams.install(self)
        try:
            yield self
        finally:
            seams.install(before)

    def carrier(self) -> Carrier:
        """A function of a batch's features that returns them, for `preprocess=`: where it is unpickled, faults happen."""
        return Carrier(self)

    def reached(self, phase: Phase, round_number: int, replica: int | None) -> None:
        """See `seams.Hook`."""
        match self._due(phase, round_number, replica, corrupting=False):
            case Fault(kind="fail", value=error):
                raise error
            case Fault(kind="delay", value=seconds):
                time.sleep(seconds)
            case Fault(kind="kill", value=signum):
                pid = os.getpid()
                assert pid > 1, "0 and 1 are never ours"
                os.kill(pid, signum)
            case Fault(kind="call", value=action):
                action()

    def passing(self, phase: Phase, round_number: int, replica: int | None, data: Buffer) -> Buffer:
        """See `seams.Hook`."""
        if not memoryview(data).nbytes or self._due(phase, round_number, replica, corrupting=True) is None:
            return data
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 1
        return changed

    def _due(self, phase: Phase, round_number: int, replica: int | None, *, corrupting: bool) -> Fault | None:
        """The first fault of this place that has not happened yet; it counts as happened from now on."""
        for fault in self.faults:
            if (fault.kind == "corrupt") is corrupting and fault.matches(phase, round_number, replica):
                try:
                    os.close(os.open(self._mark(fault), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                except (FileExistsError, FileNotFoundError):
                    continue
                return fault
        return None

    # -- afterwards ----------------------------------------------------------------------------------------------

    def fired(self) -> list[Fault]:
        """What has happened."""
        return [fault for fault in self.faults if self._mark(fault).exists()]

    def check_fired(self) -> None:
        """Check that every planned fault has happened; none can happen twice.

        Raises:
            AssertionError: naming those that did not.
        """
        if missing := [replace(fault, value=None) for fault in self.faults if not self._mark(fault).exists()]:
            raise AssertionError(f"planned, but never happened: {missing}")

    def _mark(self, fault: Fault) -> Path:
        return self.folder / f"fault-{fault.number:04d}"


@final
class Carrier:
    """Takes an injector along to where it is unpickled, and is otherwise a function that changes nothing."""

    def __init__(self, injector: Injector) -> None:
        self._injector = injector

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled: install the injector here, unless this very process planned it."""
        self.__dict__.update(state)
        here = seams.installed()
        if not isinstance(here, Injector) or here.folder != self._injector.folder:
            seams.install(self._injector)

    def __call__(self, features: Any) -> Any:
        """The features as they are."""
        return features
