"""A TCP proxy between replicas and the coordinator, that cuts or slows one replica's line when a test says so."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_CHUNK_BYTES = 1 << 14


class Touch:
    """Makes a file: an action for an injector, on whichever machine shares the folder."""

    def __init__(self, path):
        self.path = str(path)

    def __call__(self):
        Path(self.path).touch()


@dataclass
class LineFault:
    """What happens to a replica's line once `sign` is there: it is cut, goes dead or slow after `after_bytes` more.

    "cut" resets the connection, "dead" lets nothing through any more without a word, as a cable that is pulled; "slow"
    lets `bytes_per_s` through from there on.
    """

    sign: Path
    replica: int
    how: str
    after_bytes: int = 0
    bytes_per_s: float = 0.0
    struck: int = 0
    passed: int = 0


class TcpProxy:
    """Listens at `listen`, forwards to `target`; both (host, port)."""

    def __init__(self, listen, target, faults=()):
        self._target = target
        self.faults = list(faults)
        self.connections = 0
        self._closed = False
        self._sockets = []
        self._listener = socket.create_server(listen)
        self._listener.settimeout(0.2)
        self.address = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept, name="proxy", daemon=True)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closed = True
        self._listener.close()
        for sock in self._sockets:
            _hang_up(sock)
        for thread in self._threads:
            thread.join(timeout=5.0)

    def check_fired(self):
        """Every fault must have struck, and once."""
        struck = [(fault.how, fault.replica, fault.struck) for fault in self.faults]
        assert all(times == 1 for _, _, times in struck), struck

    def _accept(self):
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except (TimeoutError, OSError):
                continue
            far = socket.create_connection(self._target, timeout=5.0)
            self.connections += 1
            self._sockets += [near, far]
            for sock in (near, far):
                sock.settimeout(0.2)
            state = {"replica": None}
            for source, sink, upward in ((near, far, True), (far, near, False)):
                sock_thread = threading.Thread(
                    target=self._pump, args=(source, sink, upward, state), name="proxy", daemon=True
                )
                self._threads.append(sock_thread)
                sock_thread.start()

    def _pump(self, source, sink, upward, state):
        try:
            while not self._closed:
                try:
                    data = source.recv(_CHUNK_BYTES)
                except TimeoutError:
                    continue
                if not data:
                    break
                if upward and state["replica"] is None and (found := re.search(rb'"replica": (\d+)', data)):
                    state["replica"] = int(found[1])  # the hello names it
                if self._strikes(data, upward, state, source, sink):
                    return
                self._send(sink, data)
        except OSError:
            pass  # one end hung up: so does the other
        _hang_up(source)
        _hang_up(sink)

    def _send(self, sink, data):
        left = memoryview(data)
        while left and not self._closed:
            with contextlib.suppress(TimeoutError):
                left = left[sink.send(left) :]

    def _strikes(self, data, upward, state, source, sink):
        """Whether the line is lost with this piece."""
        for fault in self.faults:
            mine = fault.replica == state["replica"] and fault.sign.exists()
            if state.get("dead") is fault:
                return self._swallow(source)
            if not mine or not upward or (fault.struck and state.get("slow") is not fault):
                continue
            fault.passed += len(data)
            if fault.passed <= fault.after_bytes:
                continue
            if fault.how == "slow":
                fault.struck = 1
                state["slow"] = fault
                time.sleep(len(data) / fault.bytes_per_s)
                continue
            fault.struck += 1
            if fault.how == "cut":
                for sock in (source, sink):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    _hang_up(sock)
                return True
            state["dead"] = fault
            return self._swallow(source)
        return False

    def _swallow(self, source):
        """Take what comes and pass nothing on, until the replica gives up or the proxy ends."""
        while not self._closed:
            try:
                if not source.recv(_CHUNK_BYTES):
                    return True
            except TimeoutError:
                continue
            except OSError:
                return True
        return True


def _hang_up(sock):
    with contextlib.suppress(OSError):  # the other end was faster
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
