"""A character-level GPT: DiLoCo with 4 replicas beside synchronous data-parallel AdamW, at equal tokens a replica."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from algorithm_parts.contenders import TUNING_SEED
from algorithm_parts.fits import REPLICAS, frame_of, run_fit
from algorithm_parts.results import Run, append
from algorithm_parts.text_data import load_text
from algorithm_parts.text_loop import HELD_OUT, SYNC_EVERY, Size, adamw, dense, rate_after, shards_of
from algorithm_parts.text_model import GPT, next_token_loss

__all__ = ["CONTENDERS", "SYNCHRONOUS", "TRIED", "TUNED", "Rates", "run_text", "train_one", "tune_text"]

SYNCHRONOUS: Final = "synchronous AdamW"
_WARM: Final = "DiLoCo, after synchronous steps"
CONTENDERS: Final = (SYNCHRONOUS, _WARM, "DiLoCo", "averaging")


@final
@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is tuned, on a seed of its own."""

    inner: float
    outer: float = 0.0
    """0 takes the mean itself."""


TUNED: Final[Mapping[str, Rates]] = {
    SYNCHRONOUS: Rates(inner=2e-3),
    _WARM: Rates(inner=1e-3, outer=0.6),
    "DiLoCo": Rates(inner=2e-3, outer=0.4),
    "averaging": Rates(inner=2e-3),
}
TRIED: Final[Mapping[str, Sequence[Rates]]] = {
    SYNCHRONOUS: [Rates(inner=rate) for rate in (2e-3, 4e-3)],
    _WARM: [Rates(inner=2e-3), *(Rates(inner=i, outer=o) for i, o in ((1e-3, 0.6), (2e-3, 0.4), (4e-3, 0.4)))],
    "DiLoCo": [Rates(inner=i, outer=o) for i, o in ((1e-3, 0.6), (2e-3, 0.4), (4e-3, 0.4))],
    "averaging": [Rates(inner=rate) for rate in (2e-3, 4e-3)],
}


def _table(windows: np.ndarray, *, held_out: bool) -> Any:
    import pyarrow as pa

    def column(values: np.ndarray) -> Any:
        offsets = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
        return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values, dtype=np.int16).reshape(-1)))

    marks = pa.array(np.full(len(windows), held_out))
    return pa.table({"tokens": column(windows[:, :-1]), "targets": column(windows[:, 1:]), "held_out": marks})


def _frame(size: Size, seed: int, begun: int, folder: Path) -> Any:
    """The windows of each replica in its partition, without those of the first steps, beside its part of the held-out ones."""
    import pyarrow as pa

    text = load_text(size.context, HELD_OUT)
    scored = np.array_split(text.held_out, REPLICAS)
    parts = [
        pa.concat_tables([_table(mine[begun * size.batch_size :], held_out=False), _table(theirs, held_out=True)])
        for mine, theirs in zip(shards_of(text, size, seed), scored, strict=True)
    ]
    return frame_of(parts, "tokens array<smallint>, targets array<smallint>, held_out boolean", folder)


def train_one(name: str, seed: int, size: Size, rates: Rates, folder: Path) -> Run:
    """Train one contender.

    Args:
        name: of `CONTENDERS`.
        seed: of parameters, and of which windows are trained on by whom.
        size: of model and training.
        rates: of the optimizers.
        folder: for the rows.
    """
    outer = f", outer {rates.outer:g}" if rates.outer else ""
    shown = f"AdamW {rates.inner:g}{outer}, {size.steps} steps"
    if name == SYNCHRONOUS:
        curve = dense(size, seed, rates.inner, size.steps).curve
        print(f"text {name}, seed {seed}: loss {curve[-1].loss:.4f}, {curve[-1].seconds:.1f} s", flush=True)
        return Run(part="text", name=name, seed=seed, rounds=size.steps, settings=shown, curve=curve)
    if name != _WARM:
        return _local(name, seed, size, rates, folder / f"{seed}", begun=0, shown=shown)
    before = dense(size, seed, TUNED[SYNCHRONOUS].inner, size.warm_steps)
    shown += f", {size.warm_steps} of them synchronous"
    run = _local(name, seed, size, rates, folder / f"{seed}-warm", begun=size.warm_steps, shown=shown)
    start = before.curve[-1]
    later = [
        dataclasses.replace(
            point,
            rows=start.rows + point.rows,
            megabytes=start.megabytes + point.megabytes,
            seconds=start.seconds + point.seconds,
        )
        for point in run.curve
    ]
    return dataclasses.replace(run, curve=[*before.curve, *later], rounds=run.rounds + size.warm_steps)


def _local(name: str, seed: int, size: Size, rates: Rates, folder: Path, *, begun: int, shown: str) -> Run:
    from sparkdeep.algorithms import averaging, diloco

    torch.manual_seed(seed)
    model = GPT(**size.model())
    if begun:
        model.load_state_dict(dense(size, seed, TUNED[SYNCHRONOUS].inner, begun).state)
    schedule = functools.partial(rate_after, steps=size.steps, begun=begun)
    settings = {
        "model": model,
        "loss": next_token_loss,
        "feature_cols": "tokens",
        "label_cols": "targets",
        "algorithm": diloco(lr=rates.outer, sync_every=SYNC_EVERY) if rates.outer else averaging(SYNC_EVERY),
        "optimizer": adamw(rates.inner),
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=schedule),
        "clip_grad_norm": 1.0,
        "num_workers": REPLICAS,
        "batch_size": size.batch_size,
        "deal": "partitions",
        "validation": "held_out",
        "validate_every": 2,
        "aggregation": "star",
    }
    frame = _frame(size, seed, begun, folder)
    return run_fit(frame, part="text", name=name, seed=seed, settings=settings, shown=shown)


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
