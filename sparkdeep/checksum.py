"""The checksum at the end of every body of the parameter plane: XXH3, 64 bits, taken while the bytes pass by.

It finds what was damaged on its way; it is no proof of who sent it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import xxhash

__all__ = ["CHECKSUM_BYTES", "Checksum", "checksummed"]

CHECKSUM_BYTES: Final = 8

Checksum = xxhash.xxh3_64


def checksummed(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The pieces of a body, and their checksum after the last: each is hashed on its way out, while it is in cache."""
    checksum = Checksum()
    for piece in pieces:
        checksum.update(piece)
        yield piece
    yield checksum.digest()
