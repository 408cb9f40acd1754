"""Synchronous training of the GPT as a plain loop, and what the contenders have in common: sizes, rates, rows."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from algorithm_parts.fits import REPLICAS
from algorithm_parts.results import Point
from algorithm_parts.text_data import VOCABULARY, Text, load_text
from algorithm_parts.text_model import GPT, next_token_loss

__all__ = ["HELD_OUT", "SYNC_EVERY", "Dense", "Size", "adamw", "dense", "rate_after", "shards_of"]

SYNC_EVERY: Final = 30
HELD_OUT: Final = 512  # windows


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained; at these 1.05 million parameters."""

    steps: int = 600
    warm_steps: int = 300
    """Synchronous ones before DiLoCo begins, where it does not begin at once; of its paper's 88,000, 24,000 were."""
    batch_size: int = 8
    """Windows a step and replica."""
    context: int = 32
    width: int = 168
    layers: int = 3
    heads: int = 4

    def model(self) -> dict[str, int]:
        """Arguments of `GPT`."""
        own = ("context", "width", "layers", "heads")
        return {"vocabulary": VOCABULARY, **{name: getattr(self, name) for name in own}}


def rate_after(step: int, *, steps: int, begun: int = 0) -> float:
    """Share of the highest rate: up over a tenth of the steps, then down to a tenth of it by a cosine.

    Args:
        step: since the optimizer was made.
        steps: of the whole training.
        begun: steps before that.
    """
    step, warm = begun + step, max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def adamw(rate: float) -> Any:
    """The optimizer of every contender."""
    return functools.partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def shards_of(text: Text, size: Size, seed: int) -> list[np.ndarray]:
    """Windows of each replica, of which every one is seen once: (steps * batch_size, context + 1)."""
    rows = size.steps * size.batch_size
    if REPLICAS * rows > len(text.train):
        raise ValueError(f"{REPLICAS * rows} windows are wanted and there are {len(text.train)}: lower --steps.")
    order = np.random.default_rng(seed).permutation(len(text.train))
    return [text.train[order[i * rows : (i + 1) * rows]] for i in range(REPLICAS)]


def _batches(shards: list[np.ndarray], size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows of all replicas' steps, (replicas * batch_size, context) each, and what follows them."""
    for step in range(size.steps):
        cut = slice(step * size.batch_size, (step + 1) * size.batch_size)
        tokens = torch.from_numpy(np.concatenate([shard[cut] for shard in shards]).astype(np.int64))
        yield tokens[:, :-1], tokens[:, 1:]


@final
@dataclass(frozen=True, kw_only=True)
class Dense:
    """What synchronous training gave."""

    curve: list[Point]
    state: dict[str, Tensor]
    """Of the model."""


@functools.cache
def dense(size: Size, seed: int, rate: float, steps: int) -> Dense:
    """AdamW on the mean gradient of all replicas' batches, which is one batch of them all, in this process.

    Its bytes are those that gradients would be, to the driver and parameters back at every step.

    Args:
        size: of model and training.
        seed: of parameters and windows.
        rate: the highest of AdamW.
        steps: the first ones, of `size.steps`.
    """
    text = load_text(size.context, HELD_OUT)
    torch.manual_seed(seed)
    model = GPT(**size.model())
    optimizer = adamw(rate)(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(rate_after, steps=size.steps))
    megabytes = 2 * REPLICAS * 4e-6 * sum(parameter.numel() for parameter in model.parameters())
    held_out = torch.from_numpy(text.held_out.astype(np.int64))
    seconds, curve = 0.0, []
    batches = itertools.islice(_batches(shards_of(text, size, seed), size), steps)
    for step, (tokens, targets) in enumerate(batches, 1):
        began = time.monotonic()
        optimizer.zero_grad()
        torch.autograd.backward(next_token_loss(model(tokens), targets))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.monotonic() - began
        if step % (2 * SYNC_EVERY) == 0 or step == steps:
            with torch.inference_mode():
                losses = [next_token_loss(model(rows[:, :-1]), rows[:, 1:]) for rows in torch.split(held_out, 64)]
            loss = float(torch.stack(losses).mean())
            rows_seen = step * size.batch_size * REPLICAS
            curve.append(Point(rows=rows_seen, megabytes=step * megabytes, seconds=seconds, loss=loss))
    return Dense(curve=curve, state=model.state_dict())
