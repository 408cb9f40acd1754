"""One fit through `TorchEstimator` on Spark in this machine, and its records as a `Run`."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from speed_parts.images import Images

from algorithm_parts.results import Point, Run

__all__ = ["REPLICAS", "curve_of", "frame_of", "image_table", "run_fit", "spark_session"]

REPLICAS: Final = 4


@functools.cache
def spark_session() -> Any:
    """local[4] without a UI; Python workers find `algorithm_parts` and `benchmarks`."""
    from pyspark.sql import SparkSession

    folder = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return (
        SparkSession.builder.master(f"local[{REPLICAS}]")
        .appName("sparkdeep compare")
        .config("spark.ui.enabled", "false")
        .config("spark.executorEnv.PYTHONPATH", os.environ["PYTHONPATH"])
        .config("spark.sql.shuffle.partitions", str(REPLICAS))
        .config("spark.python.daemon.module", "sparkdeep.spark.daemon")
        .getOrCreate()
    )


def _read_parts(paths: Sequence[str]) -> Any:
    def read(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow.parquet as pq

        for batch in batches:
            for part in batch.column(0).to_pylist():
                yield from pq.read_table(paths[part]).to_batches()

    return read


def frame_of(parts: Sequence[Any], schema: str, folder: Path) -> Any:
    """Tables of pyarrow as a DataFrame with a partition for each, in their order.

    Args:
        parts: one table a partition.
        schema: their columns, as Spark writes them.
        folder: where they are written to; it must stay as long as the DataFrame.
    """
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"part-{number}.parquet") for number in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        pq.write_table(part, path)
    return spark_session().range(0, len(parts), 1, len(parts)).mapInArrow(_read_parts(paths), schema)


def image_table(images: Images, rows: np.ndarray, *, held_out_from: int) -> Any:
    """Some of the images as a table of pyarrow: `pixels`, `label`, and `held_out`, true from that place on."""
    import pyarrow as pa

    pixels, width = images.pixels[rows], images.pixels.shape[1]
    offsets = pa.array(np.arange(0, pixels.size + 1, width, dtype=np.int32))
    lists = pa.ListArray.from_arrays(offsets, pa.array(pixels.reshape(-1)))
    marks = pa.array(np.arange(len(rows)) >= held_out_from)
    return pa.table({"pixels": lists, "label": images.labels[rows], "held_out": marks})


def run_fit(frame: Any, *, part: str, name: str, seed: int, settings: Mapping[str, Any], shown: str) -> Run:
    """Train and tell.

    Args:
        frame: the rows; of those that `settings` marks as validation, every point of the curve.
        part: of the job.
        name: of the contender.
        seed: of parameters, rows and replicas.
        settings: of `TorchEstimator`.
        shown: what to say of them.
    """
    import torch

    from sparkdeep import TorchEstimator

    torch.manual_seed(seed)
    began = time.monotonic()
    history = TorchEstimator(**settings, seed=seed, progress=False).fit(frame).history
    run = Run(part=part, name=name, seed=seed, rounds=len(history), settings=shown, curve=curve_of(history))
    end = run.last
    scored = f"loss {end.loss:.4f}" + ("" if end.accuracy is None else f", accuracy {end.accuracy:.4f}")
    print(
        f"{part} {name}, seed {seed}: {scored}, {run.rounds} rounds, {end.megabytes:.1f} MB, {end.seconds:.1f} s "
        f"({time.monotonic() - began:.1f} s with ingest and scoring)",
        flush=True,
    )
    return run


def curve_of(history: Sequence[Any]) -> list[Point]:
    """A point for every record that was scored."""
    rows, moved, seconds, points = 0, 0, 0.0, []
    for record in history:
        rows += record.rows
        moved += record.sent_bytes + record.received_bytes
        seconds += record.seconds - record.validation_seconds - record.stage_seconds
        if record.metrics:
            points.append(
                Point(
                    rows=rows,
                    megabytes=moved / 1e6,
                    seconds=round(seconds, 3),
                    loss=record.metrics["loss"],
                    accuracy=record.metrics.get("accuracy"),
                )
            )
    return points
