"""The sources of Python's own standard library as text: windows of characters, split by file."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np

__all__ = ["VOCABULARY", "Text", "encoded", "load_text"]

_OTHERS: Final = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"))
_LEFT_OUT: Final = 10  # every tenth file is for validation
_KNOWN: Final = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY: Final = len(_KNOWN) + 1
"""Printable ASCII and the end of a line; all else is one character."""


@final
@dataclass(frozen=True, kw_only=True)
class Text:
    """Windows that do not overlap but in one character: a target for every position."""

    train: np.ndarray
    """(windows, context + 1) uint8."""
    held_out: np.ndarray
    """As `train`, of files that it has nothing of."""


def encoded(text: str) -> np.ndarray:
    """Characters as numbers, (len(text),) uint8."""
    table = np.full(128, VOCABULARY - 1, dtype=np.uint8)
    table[[ord(one) for one in _KNOWN]] = np.arange(len(_KNOWN), dtype=np.uint8)
    codes = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)
    return table[codes]


def _windows(files: list[Path], context: int) -> np.ndarray:
    stream = np.concatenate([encoded(path.read_text(encoding="utf-8", errors="replace") + "\n") for path in files])
    count = (len(stream) - 1) // context
    return np.lib.stride_tricks.sliding_window_view(stream, context + 1)[: count * context : context]


def load_text(context: int, held_out: int) -> Text:
    """The modules and packages of the standard library without tests; `held_out` windows spread over the files left out."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(library) for path in library.rglob("*.py"))
    files = [library / path for path in sorted(paths) if not _OTHERS.intersection(path.parts)]
    left_out = files[_LEFT_OUT - 1 :: _LEFT_OUT]
    windows = _windows(left_out, context)
    return Text(
        train=_windows([path for path in files if path not in left_out], context),
        held_out=windows[np.linspace(0, len(windows) - 1, held_out).astype(int)],
    )
