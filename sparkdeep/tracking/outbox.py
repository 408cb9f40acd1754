"""Items for a server that may be slow or down: training never waits for it, and nothing is thrown away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, final

__all__ = ["Outbox"]

_LOG = logging.getLogger("sparkdeep")
_LOOK_EVERY_S: Final = 0.05


@final
class Outbox:
    """Sends items in their order, from a thread of its own.

    Args:
        server: what it is called in messages.
        send: is given the waiting items, sends some from the front and returns how many, or raises. It must end within
            a few `timeout_s`, whatever the server does.
        is_transient: whether what `send` raised may not happen the next time. Anything else is the fault of the first
            item, which is dropped with a warning.
        timeout_s: how long a failing server is tried before `close` and `flush` give up.
        progress_timeout_s: how long they wait for a working server.
        retry_s: wait between attempts.
    """

    def __init__(
        self,
        server: str,
        send: Callable[[Sequence[Any]], int],
        is_transient: Callable[[Exception], bool],
        *,
        timeout_s: float,
        progress_timeout_s: float,
        retry_s: float = 1.0,
    ) -> None:
        self._server = server
        self._send = send
        self._is_transient = is_transient
        self._timeout_s = timeout_s
        self._progress_timeout_s = progress_timeout_s
        self._retry_s = retry_s
        self._items: list[Any] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failing_since: float | None = None
        self._warned = False

    def __len__(self) -> int:
        """How many items are waiting."""
        with self._changed:
            return len(self._items)

    def put(self, item: Any) -> None:
        """Add an item; returns at once."""
        with self._changed:
            self._items.append(item)
            self._start()
            self._changed.notify_all()

    def flush(self) -> int:
        """Try to send what is waiting; returns how many items are left, which are kept."""
        with self._changed:
            self._start()
            began = time.monotonic()
            while self._items and not self._given_up(began):
                self._changed.wait(_LOOK_EVERY_S)
            return len(self._items)

    def close(self) -> int:
        """Like `flush`, and end the thread; `put` and `flush` start another one."""
        left = self.flush()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and not left:
            thread.join(timeout=self._timeout_s)
        if left:
            _LOG.warning(
                "%s: %d item(s) of this run were not taken and are kept; call flush() when the server is back.",
                self._server,
                left,
            )
        return left

    def _start(self) -> None:
        """Called with the lock held."""
        self._stopping = False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"sparkdeep-{self._server}", daemon=True)
            self._thread.start()

    def _given_up(self, began: float) -> bool:
        now = time.monotonic()
        failing = self._failing_since
        unreachable = failing is not None and now - max(failing, began) > self._timeout_s
        return unreachable or now - began > self._progress_timeout_s

    def _run(self) -> None:
        most: int | None = None
        while True:
            with self._changed:
                while not self._items and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    self._thread = None
                    return
                batch = self._items[:most]
            try:
                done = self._send(batch)
            except Exception as error:  # noqa: BLE001 (told to the user, and the item is kept or named)
                done, most = self._failed(error, batch)
            else:
                most = None
                self._failing_since = None
            with self._changed:
                del self._items[:done]
                self._changed.notify_all()

    def _failed(self, error: Exception, batch: Sequence[Any]) -> tuple[int, int | None]:
        """What to do after a failure: how many items to drop, and how many to try next."""
        if not self._is_transient(error):
            if len(batch) > 1:
                return 0, 1  # one by one, so that the right one is dropped
            _LOG.warning("%s refused %s: %s", self._server, batch[0], error)
            return 1, 1
        with self._changed:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
            if not self._warned:
                self._warned = True
                _LOG.warning(
                    "%s cannot be reached: %s. Training goes on; what could not be sent is kept and tried again.",
                    self._server,
                    error,
                )
            if not self._stopping:
                self._changed.wait_for(lambda: self._stopping, timeout=self._retry_s)
        return 0, None
