"""Where the replicas of a stage tell each other how they can be reached: on the driver, through their own connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, final

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import field
from sparkdeep.stages.driver_link import DriverLink

__all__ = ["Meeting"]

_MOST_KEYS: Final = 1 << 16
_LONGEST_VALUE: Final = 1 << 16
_LONGEST_KEY: Final = 1 << 10
_MOST_BYTES: Final = 1 << 26


@final
class Meeting:
    """Keys and values of one stage; nothing listens for it but the coordinator, which has checked the token.

    Args:
        timeout_s: for a value to come.
        check: called while one waits; raises to give up.
    """

    def __init__(self, *, timeout_s: float, check: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._check = check
        self._values: dict[str, str] = {}
        self._stored = 0
        self._news = threading.Condition()

    def host(self, link: DriverLink, size: int) -> None:
        """Have a replica join the ring; returns when its connections to all others stand.

        Raises:
            ReplicaLostError: it could not reach them in time.
        """
        link.waiting = False
        link.connection.send("ring", {"size": size, "timeout_s": self._timeout_s})
        while True:
            frame = link.expect("put", "get", "formed", timeout_s=self._timeout_s)
            if frame.kind == "formed":
                link.waiting = True
                return
            key = field(frame.header, "key", str)
            if frame.kind == "put":
                self._put(key, field(frame.header, "value", str))
            else:
                link.connection.send("value", {"value": self._get(key, link.who)})

    def _put(self, key: str, value: str) -> None:
        with self._news:
            self._stored += len(key) + len(value)
            too_long = len(key) > _LONGEST_KEY or len(value) > _LONGEST_VALUE or self._stored > _MOST_BYTES
            if too_long or len(self._values) >= _MOST_KEYS:
                raise ProtocolError(
                    f"a replica wants to store {len(value)} characters beside {len(self._values)} values."
                )
            self._values[key] = value
            self._news.notify_all()

    def _get(self, key: str, who: str) -> str:
        deadline = time.monotonic() + self._timeout_s
        with self._news:
            while key not in self._values:
                if not self._news.wait(timeout=0.25):
                    self._check()
                if time.monotonic() > deadline:
                    raise ReplicaLostError(f"{who} waited {self._timeout_s:g} s for another replica to join the ring.")
            return self._values[key]
