"""What a replica keeps between rounds: inner optimizer, learning-rate clock, random generators."""

from __future__ import annotations

import copy
import ctypes
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, cast, final

import numpy as np
import torch
from torch import Tensor

from sparkdeep.errors import ProtocolError
from sparkdeep.models.generators import GENERATORS
from sparkdeep.optim.drift import CONTROL, DriftTerm
from sparkdeep.settings.run import LocalSettings

__all__ = [
    "Lent",
    "NumpyStream",
    "RandomState",
    "begin_anew",
    "group_settings",
    "read_inner_state",
    "set_mode",
    "traveling",
    "write_inner_state",
]

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


class RandomState:
    """One replica's stream of random numbers, installed in the global generators while the replica computes.

    A fresh stream equals what `torch.manual_seed(seed)`, `numpy.random.seed(seed)` and `random.seed(seed)` start, so
    one replica draws the very numbers of a plain loop.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._outside = ExitStack()
        self._numpy = NumpyStream(seed)
        with self._saved():
            torch.manual_seed(seed)
            random.seed(seed)
            self._state = self._capture()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run a block on this stream; the process's own generators are as before afterwards."""
        with ExitStack() as self._outside:
            self._outside.enter_context(self._saved())
            self._install(self._state)
            self._numpy.install()
            try:
                yield
            except BaseException:
                self._numpy.forget()
                raise
            self._numpy.keep()
            self._state = self._capture()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within `installed`, run a block that waits for others: the other replicas of this process have their turn."""
        self._numpy.keep()
        self._state = self._capture()
        self._outside.pop_all().close()
        try:
            yield
        finally:
            self._outside.enter_context(self._saved())
            self._install(self._state)
            self._numpy.install()

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Run a block on this stream without moving it: scoring must not change what training draws next."""
        with self._saved():
            self._install(self._state)
            self._numpy.install()
            try:
                yield
            finally:
                self._numpy.forget()

    @contextmanager
    def _saved(self) -> Iterator[None]:
        with GENERATORS:
            before, lent = self._capture(), Lent()
            try:
                yield
            finally:
                self._install(before)
                lent.give_back()

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, as tensors and numbers."""
        version, words, gauss = self._state["python"]
        name, keys, place, has_gauss, cached = self._numpy.get()
        state: dict[str, Any] = {
            "torch": self._state["torch"],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, cached],
            "python": [version, torch.from_numpy(np.array(words, dtype=np.int64)), gauss],
        }
        if "cuda" in self._state:
            state["cuda"] = self._state["cuda"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored position."""
        name, keys, place, has_gauss, cached = state["numpy"]
        version, words, gauss = state["python"]
        self._numpy.put((name, keys.numpy(), place, has_gauss, cached))
        self._state = {**state, "python": (version, tuple(words.tolist()), gauss)}

    def _capture(self) -> dict[str, Any]:
        """The positions of torch and Python in their own form: a round takes and sets them twice, a file only once."""
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _install(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)


def read_inner_state(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], keys: list[str] | None = None
) -> tuple[list[str], list[list[Tensor]]]:
    """The optimizer's state tensors that have their parameter's shape, for `inner_state="average"`.

    Args:
        optimizer: the replica's.
        parameters: the trainable parameters, in layout order.
        keys: the names to read; None: every name under which each parameter that has it keeps a tensor of its own shape. (Adafactor's
            factors have the shape of a weight of one row or column only.)

    Returns:
        The names (such as `exp_avg`, `momentum_buffer`), sorted, and for each name one tensor a parameter; zeros
        where a parameter has no state (it was never used).
    """
    if keys is None:
        states = [(p, optimizer.state.get(p, {})) for p in parameters]
        kept = [(key, value, p) for p, state in states for key, value in state.items() if value is not None]
        found = {key for key, value, p in kept if _is_like(value, p) and p.dim() > 0}
        keys = sorted(found - {key for key, value, p in kept if not _is_like(value, p)})
    return keys, [
        [
            value if isinstance(value := optimizer.state.get(p, {}).get(key), Tensor) else torch.zeros_like(p)
            for p in parameters
        ]
        for key in keys
    ]


# What a learning-rate scheduler may have changed, and goes on to change.
_CLOCKED: Final = {
    "params",
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "betas",
    "momentum",
    "base_momentum",
    "max_momentum",
}


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the groups of a fresh optimizer hold, but for parameters and what follows a schedule: counters, for one."""
    groups = optimizer.param_groups
    return [{key: copy.deepcopy(value) for key, value in group.items() if key not in _CLOCKED} for group in groups]


def begin_anew(optimizer: torch.optim.Optimizer, fresh: Sequence[Mapping[str, Any]]) -> None:
    """Forget all that the optimizer has gathered; its rates stay on their schedule.

    Args:
        optimizer: at rest.
        fresh: `group_settings` of it when it was made.
    """
    optimizer.state.clear()
    for group, settings in zip(optimizer.param_groups, fresh, strict=True):
        group.update(copy.deepcopy(dict(settings)))


def set_mode(optimizer: torch.optim.Optimizer, mode: Literal["train", "eval"]) -> None:
    """Tell a schedule-free optimizer whether gradients are taken at its parameters, or they are scored (Defazio et al., 2024).

    Such ones train at other parameters than the averages that they give; others have no modes.
    """
    function = getattr(optimizer, mode, None)
    if callable(function):
        function()


def traveling(
    drift: DriftTerm, settings: LocalSettings, optimizer: torch.optim.Optimizer, parameters: list[Tensor]
) -> tuple[list[str], list[list[Tensor]]]:
    """State that travels with the parameters once a round was trained, by name, one tensor a parameter."""
    if (own := drift.end()) is not None:
        return [CONTROL], [own]
    return read_inner_state(optimizer, parameters) if settings.inner_state == "average" else ([], [])


@torch.no_grad()
def write_inner_state(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], keys: list[str], values: list[list[Tensor]]
) -> None:
    """Copy averaged state tensors, as `read_inner_state` gave them, into the optimizer.

    Raises:
        ProtocolError: the optimizer keeps something else under a name.
    """
    for key, tensors in zip(keys, values, strict=True):
        for parameter, tensor in zip(parameters, tensors, strict=True):
            own = optimizer.state[parameter]
            kept = own.get(key)
            if kept is not None and not (isinstance(kept, Tensor) and kept.shape == parameter.shape):
                raise ProtocolError(
                    f"the optimizer's state {key!r} is not of its parameters' shapes and is not averaged."
                )
            if isinstance(own.get(key), Tensor):
                own[key].copy_(tensor)
            elif own:
                own[key] = tensor.to(parameter.device, parameter.dtype, copy=True)
