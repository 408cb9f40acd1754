"""Negative controls: readers with a bug of each kind, which the fuzzer must find. Run only when they are named."""

from __future__ import annotations

import os

from fuzzing import Target
from mutating import mutate_bytes

from sparkdeep.errors import DataError

SEED = b"\x04abcd\x02xy"


def index(data):
    """Believes a length byte."""
    if not data:
        raise DataError("nothing is no text")
    return data[1 : 1 + data[0]], data[1 + data[0]]


def memory(data):
    """Takes the memory that a byte announces, and calls its failure one of its own."""
    try:
        return bytearray(1 << sum(data[:1]) % 40)
    except MemoryError as error:
        raise DataError("too long") from error


def hang(data):
    """Waits for an end that a mutant need not have."""
    while not data.endswith(b"y"):
        pass


def crash(data):
    """Ends the process, as a bad access in native code would."""
    if data[:1] != SEED[:1]:
        os.abort()


def targets(_folder):
    """Those of this file."""
    return [
        Target(name=f"planted-{read.__name__}", seeds=[SEED], mutate=mutate_bytes, read=read, deadline_s=0.3)
        for read in (index, memory, hang, crash)
    ]
