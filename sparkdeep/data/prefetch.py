"""Items of an iterator, made by a thread before they are asked for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, Literal, TypeVar, final

import torch

from sparkdeep.errors import DataError

__all__ = ["prefetch_count", "prefetched", "pumped"]

_T = TypeVar("_T")

_LOOK_EVERY_S: Final = 0.1
_LAST_ITEM_S: Final = 60.0
_AHEAD: Final = 2
_POLL_S: Final = 0.1


def prefetch_count(prefetch: int | Literal["auto"], device: torch.device) -> int:
    """How many batches are gathered ahead.

    "auto" is 2 on a GPU, whose host has time to spare while it computes, and 0 on a CPU: a replica's one thread
    computes all the time, and another that gathers only takes turns with it.
    """
    if prefetch == "auto":
        return 0 if device.type == "cpu" else 2
    return prefetch


@contextmanager
def prefetched(items: Iterator[_T], count: int) -> Iterator[Iterator[_T]]:
    """Iterate over `items`, of which up to `count` are made while the block works on those before.

    Items come in their order. An exception raised while making one is raised where that item is asked for, with its
    traceback. No thread is left when the block ends, however it ends: the thread finishes the item that it is making,
    and no other.

    Args:
        items: not to be used by anybody else until the block ends.
        count: items that may wait; with 0 there is no thread, and each is made when it is asked for.

    Raises:
        TimeoutError: the item that is being made when the block ends takes longer than a minute.
    """
    if count == 0:
        yield items
        return
    prefetch = _Prefetch(items, count)
    try:
        yield prefetch
    finally:
        prefetch.close()


@final
class _Prefetch(Generic[_T]):
    """The thread, and the items that wait."""

    def __init__(self, items: Iterator[_T], ahead: int) -> None:
        self._items = items
        # An item, or why there is none: the exception that making it raised, or the end.
        self._waiting: queue.Queue[tuple[_T] | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._fill, name="sparkdeep-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        if self._over:
            raise StopIteration
        # This lasts no longer than making the item does: the thread hands over each item, its failure or the end.
        given = self._waiting.get()
        if isinstance(given, tuple):
            return given[0]
        self._over = True
        raise given

    def _fill(self) -> None:
        while not self._closed.is_set():
            given: tuple[_T] | BaseException
            try:
                given = (next(self._items),)
            except BaseException as error:  # noqa: BLE001 (raised where the item is asked for; StopIteration is the end)
                given = error
            self._hand_over(given)
            if not isinstance(given, tuple):
                return

    def _hand_over(self, given: tuple[_T] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._waiting.put(given, timeout=_LOOK_EVERY_S)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        self._closed.set()
        while not self._waiting.empty():  # makes room, so that a waiting thread ends at once
            self._waiting.get_nowait()
        self._thread.join(timeout=_LAST_ITEM_S)
        if self._thread.is_alive():
            raise TimeoutError(
                f"a batch that was being read ahead was not done {_LAST_ITEM_S:g} s after the round ended."
            )


def pumped(produce: Callable[[Callable[[], None]], Iterator[_T]], timeout_s: float, silence: str) -> Iterator[_T]:
    """Yield what `produce` yields; at most two items are made ahead.

    The thread is a daemon, and the iterator of `produce` is closed in it: at once when this one is closed early, and when
    it moves again after the deadline.

    Args:
        produce: called in the thread with a function by which it signals progress without an item.
        timeout_s: the longest time without an item or such a signal.
        silence: message of the error after that time.

    Raises:
        DataError: `silence`; and whatever `produce` or its iterator raises.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue(_AHEAD)
    stopped = threading.Event()
    seen = time.monotonic()

    def beat() -> None:
        nonlocal seen
        seen = time.monotonic()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                items.put((kind, value), timeout=_POLL_S)
                return True
            except queue.Full:
                beat()  # it is the consumer who is slow
        return False

    def run() -> None:
        try:
            source = produce(beat)
            for item in source:
                beat()
                if not put("item", item):
                    if hasattr(source, "close"):
                        source.close()
                    return
            put("end", None)
        except BaseException as error:  # noqa: BLE001 (raised again where the items are taken)
            put("error", error)

    threading.Thread(target=run, name="sparkdeep-pump", daemon=True).start()
    try:
        while True:
            try:
                kind, value = items.get(timeout=_POLL_S)
            except queue.Empty:
                if time.monotonic() - seen > timeout_s:
                    raise DataError(silence) from None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
