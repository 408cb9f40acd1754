"""A character-level GPT: DiLoCo with 4 replicas beside synchronous data-parallel AdamW, at equal tokens a replica."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from compare_parts.contenders import TUNING_SEED
from compare_parts.fits import REPLICAS, frame_of, run_fit
from compare_parts.results import Point, Run, append
from compare_parts.text_data import VOCABULARY, Text, load_text
from compare_parts.text_model import GPT, next_token_loss

__all__ = ["CONTENDERS", "SYNCHRONOUS", "TUNED", "Rates", "Size", "run_text", "scaled_rate", "train_one", "tune_text"]

SYNCHRONOUS: Final = "synchronous AdamW"
CONTENDERS: Final = (SYNCHRONOUS, "DiLoCo", "averaging")
SYNC_EVERY: Final = 30
_HELD_OUT: Final = 512  # windows
_SCORE_EVERY: Final = 2  # rounds


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained; at these 1.02 million parameters."""

    steps: int = 600
    batch_size: int = 8
    """Windows a step and replica."""
    context: int = 64
    width: int = 128
    layers: int = 5
    heads: int = 4

    def model(self) -> dict[str, int]:
        """Arguments of `GPT`."""
        return {
            "vocabulary": VOCABULARY,
            "context": self.context,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
        }


@final
@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is tuned, on a seed of its own."""

    inner: float
    outer: float = 0.0
    """0 takes the mean itself."""


TUNED: Final = {
    SYNCHRONOUS: Rates(inner=2e-3),
    "DiLoCo": Rates(inner=2e-3, outer=0.6),
    "averaging": Rates(inner=2e-3),
}

TRIED: Final = {
    SYNCHRONOUS: [Rates(inner=rate) for rate in (1e-3, 2e-3, 4e-3)],
    "DiLoCo": [Rates(inner=inner, outer=outer) for inner in (2e-3, 4e-3) for outer in (0.4, 0.6, 0.8)],
    "averaging": [Rates(inner=rate) for rate in (2e-3, 4e-3)],
}


def scaled_rate(step: int, *, steps: int) -> float:
    """Share of the highest rate: up over a tenth of the steps, then down to a tenth of it by a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _inner(rate: float) -> Any:
    return functools.partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def _schedule(steps: int) -> Any:
    return functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=functools.partial(scaled_rate, steps=steps))


def _shards(text: Text, size: Size, seed: int) -> list[np.ndarray]:
    """Windows of each replica, of which every one is seen once: (steps * batch_size, context + 1)."""
    rows = size.steps * size.batch_size
    if REPLICAS * rows > len(text.train):
        raise ValueError(f"{REPLICAS * rows} windows are wanted and there are {len(text.train)}: lower --steps.")
    order = np.random.default_rng(seed).permutation(len(text.train))
    return [text.train[order[i * rows : (i + 1) * rows]] for i in range(REPLICAS)]


def _table(windows: np.ndarray, *, held_out: bool) -> Any:
    import pyarrow as pa

    def column(values: np.ndarray) -> Any:
        offsets = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
        return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values, dtype=np.int16).reshape(-1)))

    marks = pa.array(np.full(len(windows), held_out))
    return pa.table({"tokens": column(windows[:, :-1]), "targets": column(windows[:, 1:]), "held_out": marks})


def train_one(name: str, seed: int, size: Size, rates: Rates, folder: Path) -> Run:
    """Train one contender.

    Args:
        name: of `CONTENDERS`.
        seed: of parameters, and of which windows are trained on by whom.
        size: of model and training.
        rates: of the optimizers.
        folder: for the rows.
    """
    text = load_text(size.context, _HELD_OUT)
    shards = _shards(text, size, seed)
    if name == SYNCHRONOUS:
        return _synchronous(text, shards, size, seed, rates)
    return _local(name, text, shards, size, seed, rates, folder)


def run_text(names: Sequence[str], seeds: int, size: Size, out: Path) -> None:
    """Train every contender with every seed, and add each run to `out`."""
    with tempfile.TemporaryDirectory(prefix="sparkdeep-compare-") as folder:
        for seed in range(seeds):
            for name in names:
                append(train_one(name, seed, size, TUNED[name], Path(folder)), out)


def tune_text(names: Sequence[str], size: Size, out: Path) -> dict[str, Rates]:
    """The rates of least loss by contender, each tried once on a seed of its own; runs are added to `out`/tuning."""
    best = {}
    with tempfile.TemporaryDirectory(prefix="sparkdeep-compare-") as folder:
        for name in names:
            found = {}
            for rates in TRIED[name]:
                run = train_one(name, TUNING_SEED, size, rates, Path(folder))
                print(f"  {run.settings}", flush=True)
                append(dataclasses.replace(run, name=f"{name}: {run.settings}"), out / "tuning")
                found[rates] = run.last.loss
            best[name] = min(found, key=lambda rates: found[rates])
    return best


def _local(name: str, text: Text, shards: list[np.ndarray], size: Size, seed: int, rates: Rates, folder: Path) -> Run:
    import pyarrow as pa

    from sparkdeep.algorithms import averaging, diloco

    algorithm = diloco(lr=rates.outer, sync_every=SYNC_EVERY) if name == "DiLoCo" else averaging(sync_every=SYNC_EVERY)
    scored = np.array_split(text.held_out, REPLICAS)
    parts = [
        pa.concat_tables([_table(mine, held_out=False), _table(theirs, held_out=True)])
        for mine, theirs in zip(shards, scored, strict=True)
    ]
    frame = frame_of(
        parts, "tokens array<smallint>, targets array<smallint>, held_out boolean", folder / f"seed-{seed}"
    )
    settings = {
        "model": GPT,
        "model_args": size.model(),
        "loss": next_token_loss,
        "feature_cols": "tokens",
        "label_cols": "targets",
        "algorithm": algorithm,
        "optimizer": _inner(rates.inner),
        "lr_scheduler": _schedule(size.steps),
        "clip_grad_norm": 1.0,
        "num_workers": REPLICAS,
        "batch_size": size.batch_size,
        "deal": "partitions",
        "validation": "held_out",
        "validate_every": _SCORE_EVERY,
        "aggregation": "star",
    }
    outer = f", outer {rates.outer:g}" if rates.outer else ""
    shown = f"AdamW {rates.inner:g}{outer}, {SYNC_EVERY} local steps, {size.steps} steps of {size.batch_size} windows"
    return run_fit(frame, part="text", name=name, seed=seed, settings=settings, shown=shown)


def _batches(shards: list[np.ndarray], size: Size, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows of all replicas' steps, (replicas * batch_size, context) each, and what follows them."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(shard)) for shard in shards]
    for step in range(size.steps):
        cut = slice(step * size.batch_size, (step + 1) * size.batch_size)
        windows = np.concatenate([shard[order[cut]] for shard, order in zip(shards, orders, strict=True)])
        tokens = torch.from_numpy(windows.astype(np.int64))
        yield tokens[:, :-1], tokens[:, 1:]


def _synchronous(text: Text, shards: list[np.ndarray], size: Size, seed: int, rates: Rates) -> Run:
    """A plain loop in this process: AdamW on the mean gradient of all replicas' batches, which is one batch of them all.

    Its bytes are those that gradients would be, to the driver and parameters back at every step.
    """
    torch.manual_seed(seed)
    model = GPT(**size.model())
    optimizer = _inner(rates.inner)(model.parameters())
    schedule = _schedule(size.steps)(optimizer)
    bytes_a_step = 2 * REPLICAS * 4 * sum(parameter.numel() for parameter in model.parameters())
    held_out = torch.from_numpy(text.held_out.astype(np.int64))
    seconds, curve = 0.0, []
    for step, (tokens, targets) in enumerate(_batches(shards, size, seed), 1):
        began = time.monotonic()
        optimizer.zero_grad()
        next_token_loss(model(tokens), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.monotonic() - began
        if step % (SYNC_EVERY * _SCORE_EVERY) == 0 or step == size.steps:
            with torch.inference_mode():
                losses = [next_token_loss(model(rows[:, :-1]), rows[:, 1:]) for rows in held_out.split(64)]
            loss = float(torch.stack(losses).mean())
            rows_seen = step * size.batch_size * REPLICAS
            curve.append(Point(rows=rows_seen, megabytes=step * bytes_a_step / 1e6, seconds=seconds, loss=loss))
    shown = f"AdamW {rates.inner:g}, {size.steps} steps of {REPLICAS} x {size.batch_size} windows"
    print(f"text {SYNCHRONOUS}, seed {seed}: loss {curve[-1].loss:.4f}, {seconds:.1f} s", flush=True)
    return Run(part="text", name=SYNCHRONOUS, seed=seed, rounds=size.steps, settings=shown, curve=curve)
