"""One checkout's side of `benchmarks/against.py`: fits on request, by the public names alone, which every commit has.

The process reads a line of JSON for each fit from its standard input, and answers with a line: rows a second, and seconds of
exchange a round.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

__all__ = ["main"]


class Perceptron(nn.Module):
    """784 inputs, two hidden layers of `hidden`, 10 classes."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores of the classes, (rows, 10) float32."""
        scores: torch.Tensor = self.layers(features)
        return scores


def _fit(frame: Any, *, hidden: int, rows: int, epochs: int, sync_every: int) -> dict[str, float]:
    """Rounds 2 and later of one fit."""
    from sparkdeep import TorchEstimator

    ends: list[float] = []
    history = (
        TorchEstimator(
            model=Perceptron,
            model_args={"hidden": hidden},
            loss=nn.CrossEntropyLoss(),
            optimizer=functools.partial(torch.optim.SGD, lr=0.05),
            feature_cols="features",
            label_cols="label",
            num_workers=2,
            batch_size=64,
            epochs=epochs,
            sync_every=sync_every,
            rounds_per_stage=1_000_000,
            max_stage_s=600.0,
            callbacks=[lambda _record: ends.append(time.perf_counter())],
            progress=False,
        )
        .fit(frame.limit(rows))
        .history
    )
    counted, opening_s = sum(record.rows for record in history[1:]), sum(r.stage_seconds for r in history[1:])
    return {
        "rows/s": counted / (ends[-1] - ends[0] - opening_s),
        "exchange s": statistics.median(record.exchange_seconds for record in history[1:]),
    }


def main() -> None:
    """Serve until the input ends."""
    from pyspark.sql import SparkSession

    import sparkdeep

    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.python.daemon.module", "sparkdeep.spark.daemon")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    frame = spark.read.parquet(sys.argv[1]).cache()
    frame.count()
    print(json.dumps({"package": sparkdeep.__file__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_fit(frame, **json.loads(line))), flush=True)
    spark.stop()


if __name__ == "__main__":
    sys.modules["side"] = sys.modules["__main__"]
    Perceptron.__module__ = "side"  # executors import it by this name
    main()
