"""petastorm's own reader beside the native one, on one dataset that petastorm wrote, in one run.

spark-submit benchmarks/petastorm_reading.py --lts-python .venv-lts/bin/python [--rows 100000] [--pairs 5]
    [--output runs/benchmark_petastorm]

petastorm runs in processes of the interpreter that has it (Spark 3.5, pyarrow 14), the native reader in this one, on two
cores each. Both end with numpy arrays in a Python process, as training takes them: petastorm's with one named tuple a
row, of `make_reader` with a pool of threads and with one of processes; ours with arrays of many rows, by
`petastorm.read(decode=False)` and the decoders of its columns inside `mapInArrow`, as the estimator's ingest has it.
`frame` is `petastorm.read(...)` with its columns decoded in the DataFrame, counted in Python behind it: what SQL on the
arrays costs. Steady rates leave out the time until the first rows: for ours by the clocks of the tasks.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

CORES: Final = 2
FIELDS: Final = ("matrix", "image")
BATCH_ROWS: Final = 1000  # of Spark's Arrow batches; with its 10,000 the first batch would be half of a task
TIMEOUT_S: Final = 600.0


def write(url: str, rows: int) -> None:
    """In the interpreter with petastorm: rows of a 28 x 28 float32 array and of a 32 x 32 color image as png."""
    import numpy as np
    from petastorm.codecs import CompressedImageCodec, NdarrayCodec, ScalarCodec  # type: ignore[import-not-found, unused-ignore]
    from petastorm.etl.dataset_metadata import materialize_dataset  # type: ignore[import-not-found, unused-ignore]
    from petastorm.unischema import Unischema, UnischemaField, dict_to_spark_row  # type: ignore[import-not-found, unused-ignore]
    from pyspark.sql import SparkSession
    from pyspark.sql.types import LongType

    fields = [
        UnischemaField("id", np.int64, (), ScalarCodec(LongType()), False),
        UnischemaField("matrix", np.float32, (28, 28), NdarrayCodec(), False),
        UnischemaField("image", np.uint8, (32, 32, 3), CompressedImageCodec("png"), False),
    ]
    schema = Unischema("Benchmark", fields)

    def row(number: int) -> Any:
        generator = np.random.default_rng(number)
        y, x = np.mgrid[0:32, 0:32]
        waves = 128 + 60 * np.sin(x / (3 + number % 7)) + 60 * np.cos(y / (2 + number % 5))
        image = (waves[:, :, None] * [1.0, 0.8, 0.6] + generator.integers(0, 8, (32, 32, 1))).astype(np.uint8)
        matrix = generator.standard_normal((28, 28)).astype(np.float32)
        return dict_to_spark_row(schema, {"id": number, "matrix": matrix, "image": image})

    session = SparkSession.builder.master(f"local[{CORES}]").config("spark.ui.enabled", "false").getOrCreate()
    with materialize_dataset(session, url, schema, 8):
        encoded = session.sparkContext.parallelize(range(rows), 4).map(row)
        session.createDataFrame(encoded, schema.as_spark_schema()).write.parquet(url)
    session.stop()


def read_by_petastorm(url: str, field: str, pool: str) -> dict[str, float]:
    """In the interpreter with petastorm: rows a second of its own reader."""
    from petastorm import make_reader  # type: ignore[import-not-found, unused-ignore]

    began, count, first = time.perf_counter(), 0, 0.0
    with make_reader(
        url, schema_fields=[field], reader_pool_type=pool, workers_count=CORES, num_epochs=1, shuffle_row_groups=False
    ) as reader:
        for _ in reader:
            count += 1
            first = first or time.perf_counter()
    ended = time.perf_counter()
    return {"rows": count, "steady": (count - 1) / (ended - first), "whole": count / (ended - began)}


def other(python: str, *arguments: str) -> dict[str, float]:
    """Run this file in the other interpreter, without this one's Spark; returns the JSON of its last line."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_", "PYTHON"))}
    environment |= {"PYSPARK_PYTHON": python, "PYSPARK_DRIVER_PYTHON": python, "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [python, "-W", "ignore", __file__, *arguments]
    done = subprocess.run(  # noqa: S603 (the interpreter that the user named, and this file)
        command, env=environment, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def consumer(decoders: Any) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """Make every batch numpy arrays, and give the rows, the rows after the first batch and the two clocks."""

    def consume(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        rows, after, first = 0, 0, 0.0
        for batch in batches:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                count = len(decoders[name].rows(column)) if name in decoders else len(flat(column))
            rows += count
            after += count if first else 0
            first = first or time.time()
        yield pa.RecordBatch.from_pydict({"rows": [rows], "after": [after], "first": [first], "last": [time.time()]})

    return consume


def flat(column: Any) -> Any:
    """A column of nested arrays as numpy, one item a row."""
    rows = len(column)
    while hasattr(column, "flatten") and hasattr(column.type, "value_type"):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(rows, -1)


def read_natively(session: Any, url: str, field: str, *, decode: bool) -> dict[str, float]:
    """Rows a second of the native reader."""
    from sparkdeep import petastorm

    began = time.perf_counter()
    frame = petastorm.read(session, url, [field], decode=decode)
    decoders = {} if decode else petastorm.decoders(frame)
    schema = "rows bigint, after bigint, first double, last double"
    tasks = [task for task in frame.mapInArrow(consumer(decoders), schema).collect() if task["rows"]]
    ended = time.perf_counter()
    rows = sum(task["rows"] for task in tasks)
    # Tasks run one behind the other on each core: what is steady is the time from the first batch of all to the last.
    began_steady, first_rows = min((task["first"], task["rows"] - task["after"]) for task in tasks)
    steady = (rows - first_rows) / (max(task["last"] for task in tasks) - began_steady)
    return {"rows": rows, "steady": steady, "whole": rows / (ended - began)}


def spread(values: list[float], digits: int) -> str:
    """Median with the smallest and largest value."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


NAMES: Final = {
    "thread": f"petastorm, {CORES} threads",
    "process": f"petastorm, {CORES} processes",
    "native": "native, to numpy",
    "frame": "native, decoded DataFrame",
}


def report(results: dict[str, dict[str, list[dict[str, float]]]], about: dict[str, Any]) -> str:
    """The tables, in Markdown; the ratio is to petastorm's better pool of the same pair."""
    pairs = len(next(iter(results.values()))["native"])
    lines = [
        (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores (load {about['load']:.1f}), {about['rows']} rows, "
            f"Spark {about['pyspark']}, pyarrow {about['pyarrow']}; {pairs} interleaved pairs, median (least to most)"
        )
    ]
    for field, measured in results.items():
        lines += [
            "",
            f"| {field} | rows/s, steady | with start-up | native / petastorm's better |",
            "|---|---|---|---|",
        ]
        best = [max(t["steady"], p["steady"]) for t, p in zip(measured["thread"], measured["process"], strict=True)]
        for name, runs in measured.items():
            steady, whole = [run["steady"] for run in runs], [run["whole"] for run in runs]
            ratio = ""
            if name in ("native", "frame"):
                ratio = spread([ours / theirs for ours, theirs in zip(steady, best, strict=True)], 2)
            lines.append(f"| {NAMES[name]} | {spread(steady, 0)} | {spread(whole, 0)} | {ratio} |")
    return "\n".join(lines) + "\n"


def surroundings(rows: int) -> dict[str, Any]:
    """Hardware, versions and date."""
    import pyarrow as pa
    import pyspark

    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rows": rows,
        "pyspark": pyspark.__version__,
        "pyarrow": pa.__version__,
    }


def main() -> int:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lts-python", type=Path, help="an interpreter with petastorm")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_petastorm"))
    parser.add_argument("--write", nargs=2, metavar=("URL", "ROWS"), help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=3, metavar=("URL", "FIELD", "POOL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write[0], int(arguments.write[1]))
        print("{}")
        return 0
    if arguments.read:
        print(json.dumps(read_by_petastorm(*arguments.read)))
        return 0
    if arguments.lts_python is None:
        parser.error("--lts-python is needed: an interpreter that has petastorm, such as .venv-lts/bin/python")
    python = str(arguments.lts_python.absolute())

    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{CORES}]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", BATCH_ROWS)
    session = builder.appName("sparkdeep petastorm benchmark").getOrCreate()
    results: dict[str, dict[str, list[dict[str, float]]]] = {field: {name: [] for name in NAMES} for field in FIELDS}
    with tempfile.TemporaryDirectory(prefix="sparkdeep-petastorm-") as folder:
        url = f"file://{folder}/rows"
        other(python, "--write", url, str(arguments.rows))
        about = surroundings(arguments.rows)
        for field in FIELDS:
            measures: dict[str, Callable[[], dict[str, float]]] = {
                "thread": functools.partial(other, python, "--read", url, field, "thread"),
                "process": functools.partial(other, python, "--read", url, field, "process"),
                "native": functools.partial(read_natively, session, url, field, decode=False),
                "frame": functools.partial(read_natively, session, url, field, decode=True),
            }
            read_natively(session, url, field, decode=False)  # the JVM compiles what it runs often
            for pair in range(arguments.pairs):
                # Every other pair runs backwards, so that a drift of the machine favors nobody.
                order = list(measures) if pair % 2 == 0 else list(reversed(measures))
                for name in order:
                    found = measures[name]()
                    if found["rows"] != arguments.rows:
                        raise RuntimeError(
                            f"{name} read {found['rows']} rows of {arguments.rows}: the run is worthless"
                        )
                    results[field][name].append(found)
                last = {name: runs[-1]["steady"] for name, runs in results[field].items()}
                print(f"{field}, pair {pair + 1}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in last.items()))
    session.stop()
    text = report(results, about)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "benchmark.md").write_text(text, encoding="utf-8")
    (arguments.output / "benchmark.json").write_text(
        json.dumps({**about, "results": results}, indent=1), encoding="utf-8"
    )
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
