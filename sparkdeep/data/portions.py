"""A portion of the rows as bytes that Spark keeps and moves, and as files again: any host can be given any portion."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from sparkdeep.checks import fits
from sparkdeep.errors import ReplicaLostError

__all__ = ["pieces_of", "unpack"]

_PIECE_BYTES: Final = 4 << 20


def pieces_of(directory: Path) -> Iterator[bytes]:
    """A shard's files, one after the other, in pieces of a few megabytes; the first piece names them with their sizes."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    yield json.dumps({path.name: path.stat().st_size for path in files}).encode()
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece


def unpack(pieces: Sequence[bytes | memoryview], directory: Path) -> None:
    """Make the folder that `pieces_of` was given, private to the user; it appears complete, or was there already.

    Raises:
        ReplicaLostError: pieces are missing.
        OSError: the disk is full, or cannot be written.
    """
    if directory.is_dir():
        return
    names = _names(pieces[0]) if pieces else {}
    if not names or sum(names.values()) != sum(memoryview(piece).nbytes for piece in pieces[1:]):
        raise ReplicaLostError(f"a portion came without some of its {len(pieces)} pieces; its block is damaged.")
    # If two tasks unpack the same portion here, the second one's rename fails, as the folder is not empty.
    temporary = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
    temporary.mkdir(mode=0o700)
    try:
        rest = iter(pieces[1:])
        for name, size in names.items():
            assert Path(name).name == name, f"{name!r} is no name of a file in a folder"
            with os.fdopen(os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                while file.tell() < size:
                    file.write(next(rest))
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _names(piece: bytes | memoryview) -> dict[str, int]:
    """The names and sizes in the first piece; empty if it is something else."""
    try:
        names: dict[str, int] = json.loads(bytes(piece))
    except ValueError:
        return {}
    return names if fits(names, dict[str, int]) else {}
