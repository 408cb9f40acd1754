"""numpy's global stream of random numbers, lent to a replica by swapping the bit generator below it.

`numpy.random.get_state` and `set_state` take 0.1 ms each, for every word of the state becomes a Python number on its
way; a round of one step would spend a fifth of its time there. A swap takes microseconds, and a look at the generator's
own memory tells whether anything was drawn at all.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, cast, final

import numpy as np

__all__ = ["Lent", "NumpyStream"]

_STATE_BYTES: Final = 625 * 4  # of an MT19937: 624 words and the place in them


def _words(bits: Any) -> bytes:
    """What changes with every draw; empty where it cannot be seen cheaply."""
    if type(bits) is not np.random.MT19937:
        return b""
    return ctypes.string_at(bits.ctypes.state_address, _STATE_BYTES)


@final
class NumpyStream:
    """A stream that equals what `numpy.random.seed(seed)` starts."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._mark = b""
        """The installed generator's words when the position was last known."""
        self.put(np.random.RandomState(seed % 2**32).get_state())

    def put(self, legacy: Any) -> None:
        """Go on from a position: (name, keys (624,) uint32, place, has_gauss, cached), as `numpy.random.get_state` has it."""
        name, keys, place, has_gauss, cached = legacy
        self._state: dict[str, Any] = {
            "bit_generator": name,
            "state": {"key": np.asarray(keys).astype(np.uint32), "pos": int(place)},
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        }
        self._reset()

    def get(self) -> tuple[str, Any, int, int, float]:
        """The position, as `put` takes it."""
        state = self._state
        return (
            state["bit_generator"],
            state["state"]["key"],
            state["state"]["pos"],
            state["has_gauss"],
            state["gauss"],
        )

    def install(self) -> None:
        """Let numpy's global functions draw from here."""
        _swap(self._bits, self._state)

    def keep(self) -> None:
        """Remember how far the installed stream has got."""
        if self._state["has_gauss"] or _words(self._bits) != self._mark:
            self._state = np.random.get_state(legacy=False)
            self._mark = _words(self._bits)

    def forget(self) -> None:
        """Go back to where it was when last kept."""
        if _words(self._bits) != self._mark:
            self._reset()

    def _reset(self) -> None:
        self._bits.state = cast("Any", self._state)
        self._mark = _words(self._bits)


class Lent:
    """The process's own stream, put aside while another is installed."""

    _plain: tuple[Any, bytes] | None = None
    """A generator, and the words at which it had no second normal number in store: half of what a pair gave."""

    def __init__(self) -> None:
        self._bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]  # not in numpy's stubs' list
        words = _words(self._bits)
        self._state: dict[str, Any] | None = None
        known = Lent._plain
        if known is not None and words and known[0] is self._bits and known[1] == words:
            return
        state = np.random.get_state(legacy=False)
        if state["has_gauss"]:
            self._state = state
            Lent._plain = None
        else:
            Lent._plain = (self._bits, words)

    def give_back(self) -> None:
        """Let numpy's global functions draw from it again, from where they were."""
        _swap(self._bits, self._state)


def _swap(bits: Any, state: dict[str, Any] | None) -> None:
    np.random.set_bit_generator(bits)  # type: ignore[attr-defined]  # nor this
    # The second of two normal numbers waits above the bit generator, and is gone with the swap.
    if state is not None and state["has_gauss"]:
        np.random.set_state(state)
