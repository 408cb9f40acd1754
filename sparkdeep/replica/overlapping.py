"""A replica that trains the next round while the last one's update travels (`overlap=1`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar, final

__all__ = ["AbandonedError", "Courier", "Pace"]

_T = TypeVar("_T")
# No fragment is held back longer than this: the driver counts silence as a loss.
_HELD_S: Final = 20.0
_LOOK_S: Final = 0.5


class AbandonedError(Exception):
    """The driver wants something else than the round that was begun ahead."""


@final
class Pace:
    """Spreads a vector's fragments over the steps of the round that is trained meanwhile, so that the peak shrinks.

    Fragment `i` of `n` on the way out waits for `i / 2n` of the steps, one on the way in for `(n + i) / 2n`.

    Args:
        fragments: of each vector; 1: nothing waits.
    """

    def __init__(self, fragments: int) -> None:
        self.fragments = fragments
        self._done = 0.0
        self._moved = threading.Condition()

    def reach(self, share: float) -> None:
        """So much of the round's steps is done, from 0 to 1."""
        with self._moved:
            self._done = share
            self._moved.notify_all()

    def spread(self, pieces: Iterator[_T], count: int, *, inwards: bool) -> Iterator[_T]:
        """The `count` pieces of a vector, each when its fragment is due."""
        released = 0
        for i, piece in enumerate(pieces):
            fragment = i * self.fragments // max(count, 1)
            if fragment > released:
                self._wait((fragment + (self.fragments if inwards else 0)) / (2 * self.fragments))
                released = fragment
            elif i == 0 and inwards and self.fragments > 1:
                self._wait(0.5)
            yield piece

    def _wait(self, share: float) -> None:
        deadline = time.monotonic() + _HELD_S
        with self._moved:
            while self._done < share and (left := deadline - time.monotonic()) > 0:
                self._moved.wait(timeout=left)


@final
class Courier(Generic[_T]):
    """Runs an errand to the driver in a thread of its own, while the replica trains.

    Args:
        errand: what it does, every wait in it with a deadline; it returns what came back.
        unwanted: whether what came back means that the replica trains in vain.
    """

    def __init__(self, errand: Callable[[], _T], unwanted: Callable[[_T], bool]) -> None:
        self._errand = errand
        self._unwanted = unwanted
        self._back: list[_T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sparkdeep-courier", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._back.append(self._errand())
        except BaseException as error:  # noqa: BLE001 (raised in the replica's own thread, by `check` or `wait`)
            self._failure = error

    def check(self) -> None:
        """To be called between steps.

        Raises:
            AbandonedError: what came back is unwanted.
            Exception: what went wrong on the errand.
        """
        if self._failure is not None:
            raise self._failure
        if self._back and self._unwanted(self._back[0]):
            raise AbandonedError

    def wait(self) -> _T:
        """Wait for the errand's end, which its own deadlines bound; returns what came back.

        Raises:
            Exception: what went wrong on the errand.
        """
        while self._thread.is_alive():
            self._thread.join(timeout=_LOOK_S)
        if self._failure is not None:
            raise self._failure
        return self._back[0]
