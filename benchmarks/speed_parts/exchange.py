"""Seconds of one exchange by size and number of replicas, beside gloo's all_reduce and Spark's broadcast plus collect."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from measuring.processes import gloo_group
from measuring.rows import interleaved, over, row

from speed_parts.fake_replicas import open_fake_fit

__all__ = ["measure"]

MB: Final = 1_000_000
SIZES_MB: Final = (1, 4, 40, 240, 400)
REPLICAS: Final = (2, 4, 8)
SPARKNET: Final = (240, 5)
SPARK_LIMIT: Final = (40, 4)  # MB and replicas: all of it passes through the driver's Java heap of 1 GB
SLOW_MB: Final = 900  # all replicas together: from here on 3 pairs
MOST_BYTES: Final = 8 << 30  # of memory, all processes of a case together
MOST_MB: Final = 2000  # all replicas together: from here on a round takes too long on 2 cores


def rounds_of(size_mb: int) -> int:
    """Exchanges that one value is the mean of: enough for a tenth of a second."""
    return {1: 20, 4: 10, 40: 2}.get(size_mb, 1)


def broadcast_collect(context: Any, parameters: Any, replicas: int) -> float:
    """Seconds of the same round in Spark's own means: parameters broadcast, updates collected, their mean taken."""
    began = time.perf_counter()
    shared = context.broadcast(parameters)  # (numel,) float32
    updates = context.parallelize(range(replicas), replicas).map(lambda _replica: shared.value).collect()
    parameters[:] = np.mean(updates, axis=0)
    seconds = time.perf_counter() - began
    shared.destroy()
    return seconds


def mean_of(once: Callable[[], float], times: int) -> float:
    """The mean of several rounds."""
    return sum(once() for _ in range(times)) / times


def fits_with_ring(size_mb: int, replicas: int) -> bool:
    """Whether star, ring and gloo have room beside each other: a vector a process, three a driver, two a ring's replica."""
    return (replicas + 3 + 2 * replicas + 3 + replicas) * size_mb * MB <= MOST_BYTES


def compare(spark: Any, size_mb: int, replicas: int, pairs: int) -> list[dict[str, Any]]:
    """The contenders at one size and number of replicas."""
    numel, times = size_mb * MB // 4, rounds_of(size_mb)
    measures: dict[str, Callable[[], float]] = {}
    with contextlib.ExitStack() as stack:
        for how in ("star", "ring") if fits_with_ring(size_mb, replicas) else ("star",):
            fit = stack.enter_context(open_fake_fit(replicas, numel, aggregation=how))
            measures[f"sparkdeep, {how}"] = functools.partial(mean_of, fit.round, times)
        reduce = stack.enter_context(gloo_group(replicas, numel))
        measures["gloo all_reduce"] = functools.partial(reduce, times)
        if size_mb <= SPARK_LIMIT[0] and replicas <= SPARK_LIMIT[1]:
            once = functools.partial(broadcast_collect, spark.sparkContext, np.ones(numel, dtype=np.float32), replicas)
            once()  # the first starts Python workers
            measures["broadcast + collect"] = once
        seconds = interleaved(measures, pairs)
    rows = []
    for name, values in seconds.items():
        others = [other for other in seconds if "sparkdeep" not in other] if "sparkdeep" in name else []
        ratios = {other: over(values, seconds[other]) for other in others}
        series = f"{name}, {replicas} replicas"
        rows.append(row(f"{size_mb} MB x {replicas}, {name}", "s", values, ratios=ratios, series=series, x=size_mb))
    return rows


def measure(spark: Any, *, pairs: int, quick: bool) -> dict[str, Any]:
    """Time of one round without local work, on the real wire."""
    cases = [(size, replicas) for replicas in REPLICAS for size in SIZES_MB] + [SPARKNET]
    skipped = [case for case in cases if case[0] * case[1] >= MOST_MB]
    if quick:
        cases, skipped, pairs = [(1, 2), (40, 2)], [], min(pairs, 3)
    rows = []
    for size_mb, replicas in cases:
        if (size_mb, replicas) not in skipped:
            slow = size_mb * replicas >= SLOW_MB
            rows += compare(spark, size_mb, replicas, min(pairs, 3) if slow else pairs)
    notes = [
        (
            "Rounds of a fit whose replicas, processes of their own, take no steps: parameters go down, updates come up, the "
            "mean is taken and written. gloo: all_reduce of the same bytes among as many processes. Spark: the same bytes broadcast, collected and "
            f"averaged, up to {SPARK_LIMIT[0]} MB and {SPARK_LIMIT[1]} replicas only, as all of it passes through the Java heap."
        )
    ]
    if not quick:
        notes.append(f"3 pairs from {SLOW_MB} MB in all replicas together on.")
    if skipped:
        notes.append(
            "Left out, because a round of so many bytes takes too long on 2 cores: "
            + ", ".join(f"{size} MB x {replicas}" for size, replicas in skipped)
            + "."
        )
    if roomy := [case for case in cases if case not in skipped and not fits_with_ring(*case)]:
        notes.append(
            f"Without the ring, as all together would not fit {MOST_BYTES >> 30} GiB: "
            + ", ".join(f"{size} MB x {replicas}" for size, replicas in roomy)
            + "."
        )
    return {"title": "Exchange of one round", "x_title": "MB of parameters", "rows": rows, "notes": notes}
