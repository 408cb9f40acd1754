"""Whose turn it is with the process's random generators: fits in threads of one driver, as of a search, share them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

__all__ = ["GENERATORS", "forked"]

GENERATORS: Final = threading.RLock()
"""Held by whoever seeds the default generators of torch, numpy or Python, draws from them, and puts them back."""


@contextmanager
def forked(seed: int | None = None) -> Iterator[None]:
    """Run a block that may draw from torch's generator on the CPU, seeded if a seed is given; it is as before afterwards.

    Another thread's block waits: `torch.random.fork_rng` alone would let it seed the generator in the middle of this one.
    """
    with GENERATORS, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield
