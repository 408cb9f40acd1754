"""Ingest beside a mapInArrow that only counts the same rows, and beside petastorm's converter, in one run.

python benchmarks/speed_parts/ingest.py [--pairs 9] [--quick] [--lts-python .venv-lts/bin/python] [--local-dir /dev/shm]

Rows of 784 float32, of Spark ML vectors of that width, and of 40 scalar columns in Criteo's shape, from Parquet in two
partitions. `rows` and `partitions` are the two ways to deal: the same hash, shuffle and sort, with the rows counted behind
them and ingested behind them; what these cost is seen beside `count`, which has none. Everything from the plan to the
manifests is timed. petastorm's converter writes the rows as Parquet and reads torch batches of them, in its own interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TASKS: Final = 2
WIDE: Final = 784
FLOATS, INTEGERS = 13, 26
SHAPES: Final = {"784 floats": 100_000, "vector of 784": 60_000, "40 scalars": 1_000_000}
QUICK_SHARE: Final = 20
TIMEOUT_S: Final = 600.0


def write_rows(path: Path, shape: str, rows: int) -> None:
    """Write seeded rows as one Parquet file a task; vectors begin as arrays."""
    generator = np.random.default_rng(0)
    path.mkdir()
    for task in range(TASKS):
        count = rows // TASKS
        if shape == "40 scalars":
            columns = {f"I{i}": pa.array(generator.standard_normal(count, dtype=np.float32)) for i in range(FLOATS)}
            columns |= {f"C{i}": pa.array(generator.integers(0, 1 << 20, count, np.int32)) for i in range(INTEGERS)}
        else:
            values = generator.standard_normal((count, WIDE), dtype=np.float32)  # (rows, 784) float32
            offsets = pa.array(np.arange(count + 1, dtype=np.int32) * WIDE)
            columns = {"features": pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))}
        columns["label"] = pa.array(generator.integers(0, 10, count))
        pq.write_table(pa.table(columns), path / f"{task}.parquet", row_group_size=4096)


def counted(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The rows of a task."""
    yield pa.RecordBatch.from_pydict({"rows": pa.array([sum(batch.num_rows for batch in batches)], pa.int64())})


def count(frame: Any) -> int:
    """The rows of a DataFrame, counted in Python."""
    found: int = sum(row["rows"] for row in frame.mapInArrow(counted, "rows bigint").collect())
    return found


def count_dealt(frame: Any, schema: Any, deal: str) -> int:
    """The rows on their way to shards, counted."""
    return count(dealt_rows(frame, schema, deal))


def ingest(frame: Any, schema: Any, deal: str) -> tuple[int, str]:
    """Shards of a DataFrame, as a fit makes them: the rows, and the run to be removed."""
    from sparkdeep.rounds.fit import new_run_id
    from sparkdeep.spark.ingest.ingest import read_manifests, shards_of

    run = new_run_id()
    shards = shards_of(dealt_rows(frame, schema, deal), schema, run=run, decode=None, shard_dir=None, profile=None)
    ingested = read_manifests(shards.collect(), schema, TASKS)
    shards.unpersist()
    return sum(fact.rows["train"] for fact in ingested.facts), run


def dealt_rows(frame: Any, schema: Any, deal: str) -> Any:
    """The rows on their way to `TASKS` shards."""
    from sparkdeep.spark.ingest.ingest import dealt

    return dealt(frame, schema, validation=None, num_workers=TASKS, seed=0, deal=deal)


def schema_of(frame: Any, shape: str) -> Any:
    """Which columns are what."""
    from sparkdeep.data.schema import build_schema
    from sparkdeep.spark.session.types import column_types

    names: Any = "features"
    if shape == "40 scalars":
        names = {"dense": [f"I{i}" for i in range(FLOATS)], "sparse": [f"C{i}" for i in range(INTEGERS)]}
    types = column_types(frame.schema, frame.columns)
    return build_schema(types=types, feature_cols=names, label_cols="label", weight_col=None)


def read_by_petastorm(path: str) -> float:
    """In the interpreter with petastorm: rows a second from a DataFrame to torch batches, start-up of Spark apart."""
    from petastorm.spark import SparkDatasetConverter, make_spark_converter  # type: ignore[import-not-found, unused-ignore]
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{TASKS}]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.memory", "4g").getOrCreate()
    cache = tempfile.mkdtemp(prefix="sparkdeep-petastorm-")
    spark.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, f"file://{cache}")
    frame = spark.read.parquet(path)
    frame.count()  # the JVM has started
    began = time.perf_counter()
    converter = make_spark_converter(frame)
    with converter.make_torch_dataloader(batch_size=1024, num_epochs=1, workers_count=TASKS) as loader:
        rows = sum(len(batch["label"]) for batch in loader)
    rate: float = rows / (time.perf_counter() - began)
    spark.stop()
    shutil.rmtree(cache)
    return rate


def other(python: Path, path: Path) -> float:
    """Run this file in the other interpreter, without this one's Spark."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_", "PYTHON"))}
    environment |= {"PYSPARK_PYTHON": str(python), "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [str(python), "-W", "ignore", __file__, "--converter", str(path)]
    done = subprocess.run(  # noqa: S603 (the interpreter that the user named, and this file)
        command, env=environment, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(
    spark: Any, *, pairs: int, quick: bool, lts_python: Path | None = None, shapes: Sequence[str] = tuple(SHAPES)
) -> dict[str, Any]:
    """Measure every shape, interleaved.

    Args:
        spark: a session with two cores.
        pairs: how often.
        quick: a twentieth of the rows, at most 2 pairs, within 15 s: start-up then counts for much.
        lts_python: an interpreter with petastorm; None: without it.
        shapes: which of `SHAPES`.

    Returns:
        "title", "rows" and "notes", ready for JSON; ratios are of that row to another, within a pair.
    """
    from pyspark.ml.functions import array_to_vector

    from speed_parts.transform import one_task_a_file

    lines: list[dict[str, Any]] = []
    pairs = min(pairs, 2) if quick else pairs
    sizes = {shape: rows // QUICK_SHARE if quick else rows for shape, rows in SHAPES.items() if shape in shapes}
    with tempfile.TemporaryDirectory(prefix="sparkdeep-benchmark-") as folder, one_task_a_file(spark):
        for number, (shape, rows) in enumerate(sizes.items()):
            path = Path(folder) / str(number)
            write_rows(path, shape, rows)
            frame = spark.read.parquet(f"file://{path}")
            if shape.startswith("vector"):
                frame.select(array_to_vector("features").alias("features"), "label").write.parquet(f"file://{path}.v")
                frame = spark.read.parquet(f"file://{path}.v")
            rates = _rates(spark, frame, schema_of(frame, shape), rows, pairs)
            if lts_python is not None and shape == "784 floats":
                rates["petastorm's converter"] = [other(lts_python, path) for _ in range(min(pairs, 3))]
            for name, values in rates.items():
                deal = name.removeprefix("ingest, ")
                against = (
                    {"count": rates["count"], f"count, {deal}": rates[f"count, {deal}"]} if "ingest" in name else {}
                )
                if "petastorm's converter" in rates and "ingest" in name:
                    against["petastorm's converter"] = rates["petastorm's converter"]
                ratios = {k: [a / b for a, b in zip(values, v, strict=False)] for k, v in against.items()}
                lines.append({"name": f"{shape}: {name}", "unit": "rows/s", "values": values, "ratios": ratios})
    notes = [", ".join(f"{shape}: {rows} rows" for shape, rows in sizes.items()) + f"; {TASKS} tasks"]
    return {"title": "ingest", "rows": lines, "notes": notes}


def _rates(spark: Any, frame: Any, schema: Any, rows: int, pairs: int) -> dict[str, list[float]]:
    from sparkdeep.spark.tasks.cleaning import clean_executors

    measures: dict[str, Callable[[], Any]] = {"count": partial(count, frame)}
    for deal in ("partitions", "rows"):
        measures[f"count, {deal}"] = partial(count_dealt, frame, schema, deal)
        measures[f"ingest, {deal}"] = partial(ingest, frame, schema, deal)
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for pair in range(pairs + 1):
        # Every other pair runs backwards, so that a drift of the machine favors nobody; the first only warms up.
        for name in list(measures) if pair % 2 == 0 else reversed(list(measures)):
            began = time.perf_counter()
            found = measures[name]()
            taken_s = time.perf_counter() - began
            if isinstance(found, tuple):
                clean_executors(spark, found[1], None)
                found = found[0]
            if found != rows:
                raise RuntimeError(f"{name} gave {found} rows of {rows}: the run is worthless")
            if pair:
                rates[name].append(rows / taken_s)
    return rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this one; may be repeated")
    parser.add_argument("--lts-python", type=lambda text: Path(text).absolute(), help="an interpreter with petastorm")
    parser.add_argument("--local-dir", default=tempfile.gettempdir(), help="where Spark and the shards write")
    parser.add_argument("--converter", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.converter:
        print(json.dumps(read_by_petastorm(arguments.converter)))
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from pyspark.sql import SparkSession

    from speed_parts.transform import table

    builder = SparkSession.builder.master(f"local[{TASKS}]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.host", "localhost").config("spark.driver.memory", "4g")
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    spark = builder.config("spark.local.dir", arguments.local_dir).appName("sparkdeep ingest benchmark").getOrCreate()
    options = {"lts_python": arguments.lts_python, "shapes": arguments.shape or tuple(SHAPES)}
    print(table(measure(spark, pairs=arguments.pairs, quick=arguments.quick, **options)))
    spark.stop()


if __name__ == "__main__":
    main()
