"""What passed a port of this process, as the kernel counts it."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final

__all__ = ["wire_bytes"]

# struct tcp_info of Linux: tcpi_bytes_acked and tcpi_bytes_received, u64 each.
_BYTES_OFFSET: Final = 120


def wire_bytes(port: int) -> int:
    """Bytes sent (and acknowledged) and received over this process's open TCP connections at local port `port`."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not stat.S_ISSOCK(entry.stat().st_mode):
                continue
            number = os.dup(int(entry.name))
        except OSError:
            continue  # closed since it was listed
        with socket.socket(fileno=number) as sock:
            if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.type != socket.SOCK_STREAM:
                continue
            if sock.getsockname()[1] != port or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += sum(struct.unpack_from("QQ", info, _BYTES_OFFSET))
    return total
