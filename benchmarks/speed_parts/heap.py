"""400 MB of parameters through a whole fit on Spark whose driver has 1 GB of Java heap, in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from measuring.rows import row
from torch import Tensor, nn

__all__ = ["measure"]

REPLICAS: Final = 2
WIDTH: Final = 100
OUTPUTS: Final = 1_000_000
ROUNDS: Final = 2
TIMEOUT_S: Final = 240


class Wide(nn.Module):
    """One layer of WIDTH x OUTPUTS parameters, whose outputs are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, OUTPUTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (rows, WIDTH) float32 to (rows,) float32."""
        scores: Tensor = self.layer(x).mean(1)
        return scores


def _fit() -> dict[str, Any]:
    """Fit two rounds under `local[2]` with 1 GB; what became of it."""
    from pyspark.sql import SparkSession

    from sparkdeep import TorchEstimator

    spark = (
        SparkSession.builder.master(f"local[{REPLICAS}]")
        .config("spark.driver.memory", "1g")
        .config("spark.driver.host", "localhost")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    heap = spark.sparkContext._jvm.java.lang.Runtime.getRuntime().maxMemory()
    row_sql = f"transform(sequence(1, {WIDTH}), i -> float(sin(id + i))) AS x"
    frame = spark.range(4 * REPLICAS * ROUNDS).selectExpr(row_sql, "float(cos(id)) AS y")
    estimator = TorchEstimator(
        model=Wide,
        loss=nn.MSELoss(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        feature_cols="x",
        label_cols="y",
        num_workers=REPLICAS,
        batch_size=1,
        epochs=1,
        sync_every=2,
        max_retries=0,
        callbacks=[lambda record: record.round >= ROUNDS],
        progress=False,
    )
    began = time.perf_counter()
    history = estimator.fit(frame).history
    return {
        "heap_gb": heap / 2**30,
        "seconds": time.perf_counter() - began,
        "rounds": [record.seconds - record.stage_seconds for record in history],
        "exchange": [record.exchange_seconds for record in history],
        "loss": [record.loss for record in history],
    }


def measure(*, quick: bool) -> dict[str, Any]:
    """Whether it works, and seconds a round."""
    title = "400 MB of parameters with 1 GB of Java heap"
    if quick:
        return {"title": title, "rows": [], "notes": ["Left out with --quick: it takes a JVM of its own."]}
    # The JVM that spark-submit started has another heap: the child starts its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYSPARK_GATEWAY")}
    folder = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [environment.get("PYTHONPATH", "")])])
    done = subprocess.run(
        [sys.executable, "-m", "speed_parts.heap"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the fit failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "title": title,
        "rows": [
            row("a round", "s", found["rounds"]),
            row("its exchange", "s", found["exchange"]),
            row("the whole fit", "s", [found["seconds"]]),
            row("training loss", "loss", found["loss"]),
        ],
        "notes": [
            (
                f"It works: {ROUNDS} rounds, {REPLICAS} replicas of 100 million float32 parameters, Java heap "
                f"{found['heap_gb']:.2g} GiB."
            )
        ],
    }


if __name__ == "__main__":
    print(json.dumps(_fit()))
