"""`TorchModel.transform` beside pyspark's predict_batch_udf and beside a row UDF, in one run.

python benchmarks/speed_parts/transform.py [--pairs 9] [--quick] [--rows 100000]

The same network, the same rows from Parquet in two partitions and the same batch size; every prediction is made, and
nothing is kept (Spark's noop sink). The row UDF, which is far slower, is given a share of the rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

TASKS: Final = 2
BATCH: Final = 1024
WIDE: Final = 784
SCALARS: Final = ("a", "b", "c", "d")
ROW_UDF_SHARE: Final = 10  # it is given one row in so many


def network(width: int) -> nn.Module:
    """A small perceptron: what is measured is the way of the rows to it and back."""
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))


def write_rows(folder: Path, name: str, rows: int) -> str:
    """Write seeded float32 rows, an array of 784 or four columns, as one Parquet file a task."""
    generator = np.random.default_rng(0)
    path = folder / f"{name}-{rows}"
    path.mkdir()
    for task in range(TASKS):
        count = rows // TASKS
        if name == "array":
            values = generator.standard_normal((count, WIDE), dtype=np.float32)  # (rows, 784) float32
            offsets = pa.array(np.arange(count + 1, dtype=np.int32) * WIDE)
            columns = {"features": pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))}
        else:
            columns = {one: pa.array(generator.standard_normal(count, dtype=np.float32)) for one in SCALARS}
        pq.write_table(pa.table(columns), path / f"{task}.parquet", row_group_size=4096)
    return f"file://{path}"


@contextmanager
def one_task_a_file(spark: Any) -> Iterator[None]:
    """Within, Spark reads every Parquet file as one partition."""
    whole = {"spark.sql.files.maxPartitionBytes": "1g", "spark.sql.files.openCostInBytes": "1g"}
    before = {key: spark.conf.get(key) for key in whole}
    for key, value in whole.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            spark.conf.set(key, value)


def torch_model(columns: tuple[str, ...], module: nn.Module) -> Any:
    """The network as a sparkdeep model, as after a fit."""
    from sparkdeep.data.schema import ColumnType, build_schema
    from sparkdeep.spark.model.model import TorchModel

    kind = ColumnType(kind="scalar" if len(columns) > 1 else "array", dtype="float32")
    schema = build_schema(
        types=dict.fromkeys(columns, kind),
        feature_cols=columns[0] if len(columns) == 1 else list(columns),
        label_cols=None,
        weight_col=None,
    )
    if len(columns) == 1:
        schema = schema.with_seen({"features": ("float32", (WIDE,))})
    return TorchModel(module=module.eval(), schema=schema, batch_size=BATCH)


def batch_udf(columns: tuple[str, ...], module: nn.Module) -> Any:
    """The same by pyspark: numpy arrays of a batch, in float32."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import FloatType

    def make() -> Callable[..., Any]:
        torch.set_num_threads(1)

        def predict(x: Any) -> Any:
            with torch.inference_mode():
                return module(torch.from_numpy(x)).numpy().reshape(-1)

        def predict_scalars(a: Any, b: Any, c: Any, d: Any) -> Any:  # pyspark counts the arguments by the signature
            return predict(np.stack([a, b, c, d], 1))

        return predict if len(columns) == 1 else predict_scalars

    shapes = [[WIDE]] if len(columns) == 1 else None
    return predict_batch_udf(make, return_type=FloatType(), batch_size=BATCH, input_tensor_shapes=shapes)


def row_udf(module: nn.Module) -> Any:
    """The same, a row at a time."""
    from pyspark.sql.functions import udf

    def predict(*inputs: Any) -> float:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return float(module(torch.tensor(inputs[0] if len(inputs) == 1 else inputs)))

    return udf(predict, "float")


def measure(spark: Any, *, pairs: int, quick: bool, rows: int = 0) -> dict[str, Any]:
    """Measure all three on both shapes, interleaved.

    Args:
        spark: a session with two cores.
        pairs: how often.
        quick: fewer rows and pairs, within 15 s.
        rows: of the 784-float shape; five times as many of the scalars. 0: as `quick` says.

    Returns:
        "title", "rows" and "notes", ready for JSON; ratios are of `transform` to that row, within a pair.
    """
    rows, pairs = rows or (10_000 if quick else 100_000), min(pairs, 2) if quick else pairs
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sparkdeep-benchmark-") as folder, one_task_a_file(spark):
        for shape, count in (("array", rows), ("scalars", 5 * rows)):
            columns = ("features",) if shape == "array" else SCALARS
            torch.manual_seed(0)
            module = network(WIDE if shape == "array" else len(SCALARS))
            frame = spark.read.parquet(write_rows(Path(folder), shape, count))
            few = spark.read.parquet(write_rows(Path(folder), shape, count // ROW_UDF_SHARE))
            model, batched, single = torch_model(columns, module), batch_udf(columns, module), row_udf(module)
            given: dict[str, tuple[int, Callable[[], Any]]] = {
                "transform": (count, partial(model.transform, frame)),
                "predict_batch_udf": (count, partial(frame.withColumn, "prediction", batched(*columns))),
                "row UDF": (count // ROW_UDF_SHARE, partial(few.withColumn, "prediction", single(*columns))),
            }
            _refuse_other_numbers(given)
            rates: dict[str, list[float]] = {name: [] for name in given}
            for pair in range(pairs):
                # Every other pair runs backwards, so that a drift of the machine favors nobody.
                for name in list(given) if pair % 2 == 0 else reversed(list(given)):
                    number, make = given[name]
                    began = time.perf_counter()
                    make().select("prediction").write.format("noop").mode("overwrite").save()
                    rates[name].append(number / (time.perf_counter() - began))
            text = f"{WIDE} floats" if shape == "array" else f"{len(SCALARS)} scalars"
            for name, values in rates.items():
                ratios = [ours / theirs for ours, theirs in zip(rates["transform"], values, strict=True)]
                against = {} if name == "transform" else {"transform / it": ratios}
                lines.append({"name": f"{text}: {name}", "unit": "rows/s", "values": values, "ratios": against})
    notes = [f"{rows} rows of {WIDE} floats, {5 * rows} of scalars; batches of {BATCH}; {TASKS} tasks"]
    notes.append(f"the row UDF is given one row in {ROW_UDF_SHARE}")
    return {"title": "transform", "rows": lines, "notes": notes}


def _refuse_other_numbers(given: dict[str, tuple[int, Callable[[], Any]]]) -> None:
    """Run each once, which also warms it up: on the same rows all must predict the same."""
    means = {}
    for name, (_, make) in given.items():
        means[name] = [row["prediction"] for row in make().select("prediction").limit(100).collect()]
        make().select("prediction").write.format("noop").mode("overwrite").save()
    if not np.allclose(means["transform"], means["predict_batch_udf"], atol=1e-5):
        raise RuntimeError("transform and predict_batch_udf predict other numbers: the run is worthless")


def table(result: dict[str, Any]) -> str:
    """A section as Markdown: medians, least to most."""
    lines = [f"### {result['title']}", "", "| | rows/s | ratios |", "|---|---|---|"]
    for row in result["rows"]:
        ratios = "; ".join(f"{name} {spread(values, 2)}" for name, values in row["ratios"].items())
        lines.append(f"| {row['name']} | {spread(row['values'], 0)} | {ratios} |")
    return "\n".join([*lines, "", *result["notes"]]) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Median with the smallest and largest value."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=int, default=0)
    arguments = parser.parse_args()
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{TASKS}]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    spark = (
        builder.config("spark.driver.host", "localhost")
        .config("spark.driver.memory", "4g")
        .appName("sparkdeep transform benchmark")
        .getOrCreate()
    )
    print(table(measure(spark, pairs=arguments.pairs, quick=arguments.quick, rows=arguments.rows)))
    spark.stop()


if __name__ == "__main__":
    main()
