"""Named places in a fit at which a test can make something happen; where none is at work, they cost one comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, Protocol, TypeAlias

__all__ = ["PHASES", "Buffer", "Hook", "Phase", "install", "installed", "reach", "through"]

Buffer: TypeAlias = bytes | bytearray | memoryview
Phase: TypeAlias = Literal[
    "preflight",
    "slots",
    "load",
    "train",
    "step",
    "transfer",
    "average",
    "checkpoint",
    "commit",
    "between",
    "resume",
    "transform",
]
PHASES: Final[tuple[Phase, ...]] = (
    "preflight",  # driver: settings and session were checked
    "slots",  # driver: a stage is about to be asked for
    "load",  # replica: the model is built
    "train",  # replica: a round's local work begins
    "step",  # replica: a local step begins
    "transfer",  # replica: an update is sent
    "average",  # driver: every header is admitted, and the sum begins
    "checkpoint",  # driver: a checkpoint or snapshot is about to be written
    "commit",  # driver: its files are written, and it is about to count
    "between",  # driver: a round is over
    "resume",  # driver: a run looks for what it can go on with
    "transform",  # executor: a task of `transform` begins
)


class Hook(Protocol):
    """What a test installs; see `injection.Injector`."""

    def reached(self, phase: Phase, round_number: int, replica: int | None) -> None:
        """A place was reached; whatever is raised here is raised there."""

    def passing(self, phase: Phase, round_number: int, replica: int | None, data: Buffer) -> Buffer:
        """Bytes pass a place; what is returned passes in their stead."""


_hook: Hook | None = None


def install(hook: Hook | None) -> None:
    """Install a hook in this process in place of the one before; None takes it away."""
    global _hook  # noqa: PLW0603 (one process, one hook: an argument would run through every layer)
    _hook = hook


def installed() -> Hook | None:
    """The hook of this process."""
    return _hook


def reach(phase: Phase, *, round_number: int = 0, replica: int | None = None) -> None:
    """Say that a place is reached; `round_number` is 0 where no round is under way."""
    if _hook is not None:
        _hook.reached(phase, round_number, replica)


def through(
    phase: Phase, pieces: Iterator[Buffer], *, round_number: int = 0, replica: int | None = None
) -> Iterator[Buffer]:
    """Let bytes pass a place."""
    hook = _hook
    return pieces if hook is None else (hook.passing(phase, round_number, replica, piece) for piece in pieces)
