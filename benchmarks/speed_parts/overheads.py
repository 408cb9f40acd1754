"""What sparkdeep's own machinery costs: opening a stage, an empty round, the time to the first step.

python benchmarks/speed_parts/overheads.py [--pairs 9] [--quick]

Opening a stage stands beside an empty Spark barrier stage over the same kind of persisted input, one after the other in
one session. The first step is timed in sessions of their own, with Spark's Python daemon and with sparkdeep's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Final

import torch
from torch import nn

REPLICAS: Final = 2
DAEMON: Final = "sparkdeep.spark.daemon"
_FRESH_TIMEOUT_S: Final = 300.0


def _estimator(rounds: int, **settings: Any) -> Any:
    """One step of one row a round: nothing to compute, nothing to send."""
    from sparkdeep import TorchEstimator

    return TorchEstimator(
        model=nn.Linear,
        model_args={"in_features": 1, "out_features": 1},
        loss=nn.MSELoss(),
        optimizer=functools.partial(torch.optim.SGD, lr=1e-6),
        feature_cols=["x"],
        label_cols=["x"],
        num_workers=REPLICAS,
        batch_size=64,
        epochs=rounds,
        sync_every="epoch",
        progress=False,
        **settings,
    )


def _frame(spark: Any) -> Any:
    return spark.range(0, 64, 1, REPLICAS).selectExpr("double(id) AS x").cache()


def _openings(spark: Any, pairs: int) -> tuple[list[float], list[float]]:
    """Milliseconds to open a stage of one round, and of an empty barrier stage in between."""
    from sparkdeep import Callback

    def empty(frame: Any) -> Any:
        return frame.mapInArrow(lambda batches: batches, "id long", barrier=True)  # (pickled by value: no import there)

    one = empty(spark.range(0, REPLICAS, 1, REPLICAS)).persist()
    one.collect()
    ours: list[float] = []
    theirs: list[float] = []

    class Between(Callback):
        needs_spark = True  # no stage is open while this runs

        def on_round_end(self, record: Any) -> bool | None:
            ours.append(1e3 * record.stage_seconds)
            began = time.perf_counter()
            empty(one).collect()
            theirs.append(1e3 * (time.perf_counter() - began))
            return None

    # The first three open while workers start and the JVM warms up.
    _estimator(pairs + 3, callbacks=[Between()]).fit(_frame(spark))
    one.unpersist()
    return ours[3:], theirs[3:]


def _empty_rounds(spark: Any, rounds: int) -> list[float]:
    """Milliseconds between records in an open stage."""
    ends: list[float] = []
    estimator = _estimator(
        rounds, rounds_per_stage=1_000_000, callbacks=[lambda _record: ends.append(time.perf_counter())]
    )
    estimator.fit(_frame(spark))
    return [1e3 * (b - a) for a, b in itertools.pairwise(ends[5:])]


def first_step_s() -> float:
    """Seconds from the call of fit to the end of the first round, in a session whose JVM has run a job."""
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.getOrCreate()
    frame = _frame(spark)
    frame.count()
    ends: list[float] = []
    began = time.perf_counter()
    _estimator(1, callbacks=[lambda _record: ends.append(time.perf_counter())]).fit(frame)
    spark.stop()
    return ends[0] - began


def _fresh(daemon: str | None) -> float:
    """`first_step_s` in a process and session of its own."""
    settings = {"spark.master": f"local[{REPLICAS}]", "spark.ui.enabled": "false", "spark.driver.host": "localhost"}
    if daemon is not None:
        settings["spark.python.daemon.module"] = daemon
    arguments = " ".join(f"--conf {name}={value}" for name, value in settings.items())
    done = subprocess.run(  # noqa: S603 (this file, run by this interpreter)
        [sys.executable, __file__, "--first-step"],
        env={
            # Of its own JVM: under spark-submit the environment names the gateway of this one.
            **{name: value for name, value in os.environ.items() if not name.startswith("PYSPARK_GATEWAY")},
            "PYSPARK_SUBMIT_ARGS": f"{arguments} pyspark-shell",
            "PYSPARK_PYTHON": sys.executable,
        },
        capture_output=True,
        text=True,
        timeout=_FRESH_TIMEOUT_S,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(spark: Any, *, pairs: int, quick: bool) -> dict[str, Any]:
    """Measure all; JSON-ready.

    Args:
        spark: a session with two slots.
        pairs: openings beside empty stages, and sessions with each daemon (a third of them, as each takes 10 s).
        quick: one session with each daemon, and fewer rounds.
    """
    ours, theirs = _openings(spark, pairs)
    rounds = _empty_rounds(spark, 60 if quick else 400)
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(1 if quick else max(1, pairs // 3)):
        cold.append(_fresh(None))
        warm.append(_fresh(DAEMON))
    return {
        "title": "Overheads",
        "rows": [
            {"name": "empty Spark barrier stage", "unit": "ms", "values": theirs, "ratios": {}},
            _against("opening a stage", "ms", ours, {"empty Spark barrier stage": theirs}),
            {"name": "empty round in an open stage", "unit": "ms", "values": rounds, "ratios": {}},
            {"name": "first step, Spark's Python daemon", "unit": "s", "values": cold, "ratios": {}},
            _against(f"first step, {DAEMON}", "s", warm, {"Spark's Python daemon": cold}),
        ],
        "notes": [
            f"local[{REPLICAS}], {REPLICAS} replicas of one weight each; the first step in fresh sessions that have run a job."
        ],
    }


def _against(name: str, unit: str, values: list[float], others: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {other: [a / b for a, b in zip(values, theirs, strict=True)] for other, theirs in others.items()}
    return {"name": name, "unit": unit, "values": values, "ratios": ratios}


def table(section: dict[str, Any]) -> str:
    """A section as Markdown: medians, least to most."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g})"

    lines = [f"### {section['title']}", "", "| | unit | median (least to most) | ratio |", "|---|---|---|---|"]
    for row in section["rows"]:
        ratios = "; ".join(f"{spread(values)} of {name}" for name, values in row["ratios"].items())
        lines.append(f"| {row['name']} | {row['unit']} | {spread(row['values'])} | {ratios} |")
    return "\n".join([*lines, "", *section["notes"]]) + "\n"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--first-step", action="store_true", help="print the seconds to the first step, and nothing else"
    )
    arguments = parser.parse_args()
    if arguments.first_step:
        print(json.dumps(first_step_s()))
        return 0
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{REPLICAS}]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "localhost").appName("sparkdeep overheads").getOrCreate()
    print(table(measure(spark, pairs=arguments.pairs, quick=arguments.quick)), end="")
    spark.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
