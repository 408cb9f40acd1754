"""An iterator that is made in a thread, so that one which waits without a limit meets a deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from sparkdeep.errors import DataError

__all__ = ["pumped"]

_T = TypeVar("_T")
_AHEAD: Final = 2
_POLL_S: Final = 0.1


def pumped(produce: Callable[[Callable[[], None]], Iterator[_T]], timeout_s: float, silence: str) -> Iterator[_T]:
    """Yield what `produce` yields; at most two items are made ahead.

    The thread is a daemon, and the iterator of `produce` is closed in it: at once when this one is closed early, and when
    it moves again after the deadline.

    Args:
        produce: called in the thread with a function that says that there is progress without an item.
        timeout_s: the longest time without an item or such a sign.
        silence: message of the error after it.

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
                beat()  # it is the reader of the items who takes time
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
