"""Rows a second of training by `sync_every`, beside the ceiling, DistributedDataParallel and TorchDistributor."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from measuring.processes import CONTEXT, DEADLINE_S, together
from measuring.rows import interleaved, over, row
from torch import nn

from speed_parts import mlp

__all__ = ["measure"]

REPLICAS: Final = 2
CEILING: Final = "two processes that never talk"
DDP: Final = "DDP, gloo, without Spark"
DISTRIBUTOR: Final = "TorchDistributor with DDP"
PARTS: Final = ("compute_seconds", "exchange_seconds", "outer_seconds")


@dataclass(kw_only=True)
class _Bench:
    """One data set and network, measured in several ways."""

    frame: Any
    folder: str
    rows: int
    """Of each replica."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    parts_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    reopened: int = 0
    """Stages that were opened in a measured part."""

    def keep(self, name: str, loss: float) -> None:
        """Keep the loss that went with a measurement."""
        self.losses.setdefault(name, []).append(loss)

    def ceiling(self, steps: int) -> float:
        """Rows a second of independent processes together."""
        barrier = CONTEXT.Barrier(REPLICAS)
        found = together(mlp.alone, REPLICAS, barrier, self.folder, self.rows, steps)
        self.keep(CEILING, statistics.mean(loss for _, loss in found))
        return float(sum(rate for rate, _ in found))

    def ddp(self, steps: int) -> float:
        """Rows a second of plain processes that synchronize every step."""
        with tempfile.TemporaryDirectory(prefix="sparkdeep-gloo-") as store:
            found = together(mlp.ddp, REPLICAS, REPLICAS, f"{store}/store", self.folder, self.rows, steps)
        self.keep(DDP, statistics.mean(loss for _, loss in found))
        return float(sum(rate for rate, _ in found))

    def distributor(self, steps: int) -> float:
        """Rows a second of pyspark's own way to train torch."""
        from pyspark.ml.torch.distributor import TorchDistributor

        distributor = TorchDistributor(num_processes=REPLICAS, local_mode=True, use_gpu=False)
        rate, loss = distributor.run(mlp.ddp_of_distributor, self.folder, self.rows, steps)
        self.keep(DISTRIBUTOR, loss)
        return float(rate)

    def sparkdeep(self, name: str, epochs: int, options: dict[str, Any]) -> float:
        """Rows a second of rounds 2 and later, by the clock between the first record and the last."""
        from sparkdeep import TorchEstimator

        ends: list[float] = []
        estimator = TorchEstimator(
            model=mlp.network,
            loss=nn.CrossEntropyLoss(),
            optimizer=functools.partial(torch.optim.SGD, lr=mlp.LEARNING_RATE),
            feature_cols="features",
            label_cols="label",
            num_workers=REPLICAS,
            batch_size=mlp.BATCH,
            epochs=epochs,
            rounds_per_stage=1_000_000,
            max_stage_s=DEADLINE_S,
            callbacks=[lambda _record: ends.append(time.perf_counter())],
            progress=False,
            **options,
        )
        history = estimator.fit(self.frame).history
        rounds = history[1:]
        if retries := sum(record.retries for record in rounds):
            raise RuntimeError(f"{name}: {retries} failures in the measured part: run again on a quiet machine")
        # A stage makes way when Spark tells of waiting jobs, of which its own last one can be one; the opening is not the
        # round's.
        self.reopened += sum(record.stage_seconds > 0 for record in rounds)
        opening_s: float = sum(record.stage_seconds for record in rounds)
        last = [record for record in history if record.epoch == history[-1].epoch]
        self.keep(name, statistics.mean(record.loss for record in last))
        parts = self.parts_ms.setdefault(name, {part: [] for part in PARTS})
        for part in PARTS:
            parts[part].append(1e3 * statistics.median(record[part] for record in rounds))
        counted: int = sum(record.rows for record in rounds)
        return counted / (ends[-1] - ends[0] - opening_s)


def _variants(*, quick: bool) -> dict[str, tuple[int, dict[str, Any]]]:
    """What is measured of sparkdeep: name -> (epochs, arguments)."""
    if quick:
        return {"sparkdeep, sync_every=50": (2, {"sync_every": 50}), "sparkdeep, sync_every=1": (1, {"sync_every": 1})}
    return {
        "sparkdeep, sync_every=1": (1, {"sync_every": 1}),
        "sparkdeep, sync_every=10": (2, {"sync_every": 10}),
        "sparkdeep, sync_every=50": (3, {"sync_every": 50}),
        "sparkdeep, sync_every=250": (3, {"sync_every": 250}),
        "sparkdeep, sync_every=50, overlap=1": (3, {"sync_every": 50, "overlap": 1}),
    }


def measure(spark: Any, *, pairs: int, quick: bool) -> dict[str, Any]:
    """The perceptron on two replicas of one thread each, by way of training and by `sync_every`."""
    rows = 8_000 if quick else 20_000
    steps = rows // mlp.BATCH
    variants = _variants(quick=quick)
    with tempfile.TemporaryDirectory(prefix="sparkdeep-benchmark-") as folder:
        mlp.write_rows(Path(folder), REPLICAS * rows)
        bench = _Bench(frame=spark.read.parquet(f"file://{folder}/rows.parquet"), folder=folder, rows=rows)
        measures: dict[str, Callable[[], float]] = {CEILING: lambda: bench.ceiling(3 * steps)}
        for name, (epochs, options) in variants.items():
            measures[name] = functools.partial(bench.sparkdeep, name, epochs, options)
        measures |= {DDP: lambda: bench.ddp(steps), DISTRIBUTOR: lambda: bench.distributor(steps)}
        rates = interleaved(measures, 1 if quick else pairs)
    made = []
    for name, values in rates.items():
        others = [CEILING, DDP, DISTRIBUTOR] if name in variants else []
        made.append(row(name, "rows/s", values, ratios={other: over(values, rates[other]) for other in others}))
    made += [row(name, "loss of the last epoch", losses) for name, losses in bench.losses.items()]
    for name, parts in bench.parts_ms.items():
        made += [row(f"{name}: {part.removesuffix('_seconds')}", "ms a round", parts[part]) for part in PARTS]
    again = (
        f" {bench.reopened} stages were opened again in measured parts; the opening is left out."
        if bench.reopened
        else ""
    )
    return {
        "title": "Training throughput",
        "rows": made,
        "notes": [
            (
                f"A 784-256-256-10 perceptron, batch {mlp.BATCH}, SGD, {REPLICAS} x {rows:,} rows of noise, two replicas "
                'of one thread each, aggregation="auto" (the default); of sparkdeep rounds 2 and later of an open stage. '
                "The losses are of different "
                "numbers of epochs (3 without talk, 1 of DDP, of sparkdeep as many as its rate was measured over)."
                f"{again}"
            )
        ],
    }
