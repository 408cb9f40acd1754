"""Writes the datasets of this folder with petastorm itself, and what petastorm's own reader makes of them.

.venv-lts/bin/python tests/petastorm_data/make.py (Spark 3.5, pyarrow 14, petastorm 0.13): every codec and kind of field
in `fields/`, folders that look like numbers in `folders/`, one schema pickled in every way that petastorm's versions
did in `schemas/`. The values in `fields.npz` are those of make_reader: the oracle of the tests.
"""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import shutil
import sys
import types
from decimal import Decimal
from pathlib import Path

os.environ.update(PYSPARK_PYTHON=sys.executable, PYSPARK_DRIVER_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1")

import numpy as np
import pyspark.serializers
import pyspark.sql.types as T
from petastorm import codecs, make_reader, unischema
from petastorm.codecs import CompressedImageCodec, CompressedNdarrayCodec, NdarrayCodec, ScalarCodec
from petastorm.etl.dataset_metadata import materialize_dataset
from petastorm.unischema import Unischema, UnischemaField, dict_to_spark_row
from pyspark.sql import SparkSession

HERE = Path(__file__).resolve().parent
ROWS = 12
REFUSED = ["cloud", "waves"]  # written, and refused by name: no type in Spark

FIELDS = Unischema(
    "Fields",
    [
        UnischemaField("id", np.int32, (), ScalarCodec(T.IntegerType()), False),
        UnischemaField("part", np.str_, (), ScalarCodec(T.StringType()), False),
        UnischemaField("i8", np.int8, (), ScalarCodec(T.ByteType()), False),
        UnischemaField("u8", np.uint8, (), ScalarCodec(T.ShortType()), False),
        UnischemaField("u16", np.uint16, (), ScalarCodec(T.IntegerType()), False),
        UnischemaField("u32", np.uint32, (), ScalarCodec(T.LongType()), False),
        UnischemaField("i64", np.int64, (), ScalarCodec(T.LongType()), True),
        UnischemaField("f16", np.float16, (), ScalarCodec(T.FloatType()), False),
        UnischemaField("f32", np.float32, (), ScalarCodec(T.DoubleType()), False),
        UnischemaField("f64", np.float64, (), ScalarCodec(T.DoubleType()), True),
        UnischemaField("flag", np.bool_, (), ScalarCodec(T.BooleanType()), False),
        UnischemaField("text", np.str_, (), ScalarCodec(T.StringType()), True),
        UnischemaField("money", Decimal, (), ScalarCodec(T.DecimalType(10, 3)), False),
        UnischemaField("when", np.datetime64, (), ScalarCodec(T.TimestampType()), False),
        UnischemaField("bare_number", np.int16, (), None, False),
        UnischemaField("bare_text", np.str_, (), None, False),
        UnischemaField("matrix", np.float32, (2, 3), NdarrayCodec(), False),
        UnischemaField("matrix_u16", np.uint16, (3, 2), NdarrayCodec(), True),
        UnischemaField("columns_first", np.float64, (2, 3), NdarrayCodec(), False),
        UnischemaField("point", np.float32, (), NdarrayCodec(), False),
        UnischemaField("flags", np.bool_, (3,), NdarrayCodec(), False),
        UnischemaField("halves", np.float16, (2,), NdarrayCodec(), False),
        UnischemaField("times", np.datetime64, (2,), NdarrayCodec(), False),
        UnischemaField("vector", np.int32, (None,), NdarrayCodec(), True),
        UnischemaField("words", np.str_, (None,), NdarrayCodec(), False),
        UnischemaField("names", np.str_, (2,), NdarrayCodec(), False),
        UnischemaField("zipped", np.int16, (4, 2), CompressedNdarrayCodec(), False),
        UnischemaField("zipped_ragged", np.uint8, (None,), CompressedNdarrayCodec(), True),
        UnischemaField("gray", np.uint8, (5, 7), CompressedImageCodec("png"), False),
        UnischemaField("color", np.uint8, (6, 4, 3), CompressedImageCodec("png"), True),
        UnischemaField("deep", np.uint16, (5, 7), CompressedImageCodec("png"), False),
        UnischemaField("photo", np.uint8, (16, 16, 3), CompressedImageCodec("jpeg", 80), False),
        UnischemaField("cloud", np.float32, (None, 3), NdarrayCodec(), False),
        UnischemaField("waves", np.complex64, (2,), NdarrayCodec(), False),
    ],
)
FOLDERS = Unischema(
    "Folders",
    [
        UnischemaField("id", np.int64, (), ScalarCodec(T.LongType()), False),
        UnischemaField("day", np.str_, (), ScalarCodec(T.StringType()), False),
        UnischemaField("year", np.int64, (), ScalarCodec(T.LongType()), False),
    ],
)


def row(i):
    """One row of FIELDS; every third value of a nullable field is missing."""
    g = np.random.default_rng(i)
    some = None if i % 3 == 1 else True
    smooth = np.linspace(0, 200, 16 * 16 * 3).reshape(16, 16, 3) + g.integers(0, 50, (16, 16, 3))
    return {
        "id": i,
        "part": ["east", "wést"][i % 2],
        "i8": int(g.integers(-128, 128)),
        "u8": int(g.integers(0, 256)),
        "u16": int(g.integers(0, 1 << 16)),
        "u32": int(g.integers(0, 1 << 32)),
        "i64": some and int(g.integers(-(1 << 62), 1 << 62)),
        "f16": float(np.float16(g.standard_normal())),
        "f32": g.standard_normal(),
        "f64": some and g.standard_normal(),
        "flag": bool(i % 2),
        "text": some and f"row {i} é",
        "money": Decimal(int(g.integers(-(10**9), 10**9))).scaleb(-3),
        "when": np.datetime64("2001-02-03T04:05:06.789012").astype("datetime64[us]").astype(object).replace(day=1 + i),
        "bare_number": np.int16(i - 5),
        "bare_text": f"bare {i}",
        "matrix": g.standard_normal((2, 3), dtype=np.float32),
        "matrix_u16": some and g.integers(0, 1 << 16, (3, 2)).astype(np.uint16),
        "columns_first": np.asfortranarray(g.standard_normal((2, 3))),
        "point": np.asarray(g.standard_normal(), np.float32),
        "flags": g.integers(0, 2, 3).astype(bool),
        "halves": g.standard_normal(2).astype(np.float16),
        "times": np.array(["2001-01-01", "2020-02-29"], "M8[us]") + np.timedelta64(i, "s"),
        "vector": some and g.integers(-9, 9, i % 4).astype(np.int32),
        "words": np.array(["a", "bé", "ccc"][: i % 4], np.str_) if i % 4 else np.zeros(0, "U1"),
        "names": np.array(["x" * (i + 1), "y"], np.str_),
        "zipped": g.integers(-999, 999, (4, 2)).astype(np.int16),
        "zipped_ragged": some and g.integers(0, 256, i).astype(np.uint8),
        "gray": g.integers(0, 256, (5, 7)).astype(np.uint8),
        "color": some and g.integers(0, 256, (6, 4, 3)).astype(np.uint8),
        "deep": g.integers(0, 1 << 16, (5, 7)).astype(np.uint16),
        "photo": smooth.astype(np.uint8),
        "cloud": g.standard_normal((i % 3, 3), dtype=np.float32),
        "waves": (g.standard_normal(2) + 1j).astype(np.complex64),
    }


def write(spark, name, schema, rows, partition_by):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    url = f"file://{folder}"
    with materialize_dataset(spark, url, schema, 1):
        encoded = [dict_to_spark_row(schema, value) for value in rows]
        frame = spark.createDataFrame(encoded, schema.as_spark_schema()).repartition(1)
        frame.write.partitionBy(*partition_by).parquet(url)
    for path in [*folder.rglob("*.crc"), *folder.rglob("_SUCCESS")]:
        path.unlink()
    return url


def oracle(url, schema, leave_out):
    """What petastorm's own reader gives, by id; missing values as a mask."""
    names = [name for name in schema.fields if name not in leave_out]
    with make_reader(url, schema_fields=names, reader_pool_type="dummy", num_epochs=1) as reader:
        rows = sorted(reader, key=lambda value: value.id)
    out = {}
    for name in names:
        values = [getattr(value, name) for value in rows]
        present = [value for value in values if value is not None]
        out[f"{name}.missing"] = np.array([value is None for value in values])
        if isinstance(present[0], Decimal):
            present = [str(value) for value in present]
        if None in schema.fields[name].shape:
            out[f"{name}.lengths"] = np.array([len(value) for value in present])
            out[name] = np.concatenate(present)
        else:
            out[name] = np.stack([np.asarray(value) for value in present])
    return out


def schemas():
    """One schema, pickled as versions of petastorm and Spark have done."""
    folder = HERE / "schemas"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for protocol in range(6):
        (folder / f"protocol{protocol}.pickle").write_bytes(pickle.dumps(FIELDS, protocol))
    described = [
        {
            "name": field.name,
            "dtype": getattr(field.numpy_dtype, "__name__", str(field.numpy_dtype)),
            "shape": field.shape,
            "nullable": field.nullable,
            "codec": type(field.codec).__name__,
        }
        for field in FIELDS.fields.values()
    ]
    (folder / "schema.json").write_text(json.dumps(described, indent=1) + "\n")
    # Former package names: the classes say that they live there, and the pickler believes them.
    for number, package in enumerate(["av.experimental.deepdrive.dataset_toolkit", "av.ml.dataset_toolkit"]):
        parts = package.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        moved = [(unischema, [Unischema, UnischemaField])]
        moved += [(codecs, [ScalarCodec, NdarrayCodec, CompressedNdarrayCodec, CompressedImageCodec])]
        for module, classes in moved:
            name = f"{package}.{module.__name__.rpartition('.')[2]}"
            sys.modules[name] = types.ModuleType(name)
            for class_ in classes:
                setattr(sys.modules[name], class_.__name__, class_)
                class_.__module__ = name
        for protocol in (0, 2):
            (folder / f"package{number}_protocol{protocol}.pickle").write_bytes(pickle.dumps(FIELDS, protocol))
        for module, classes in moved:
            for class_ in classes:
                class_.__module__ = module.__name__

    # Spark before 3.3 replaced the pickling of every namedtuple by a call of this function.
    def _restore(name, fields, values):
        raise AssertionError("only its name is pickled")

    _restore.__module__, _restore.__qualname__ = "pyspark.serializers", "_restore"
    pyspark.serializers._restore = _restore
    copyreg.pickle(UnischemaField, lambda f: (_restore, ("UnischemaField", f._fields, tuple(f))))
    for protocol in (0, 2, 4):
        (folder / f"restore_protocol{protocol}.pickle").write_bytes(pickle.dumps(FIELDS, protocol))
    del copyreg.dispatch_table[UnischemaField], pyspark.serializers._restore
    # dtype instances in place of scalar types, numpy integers in a shape.
    odd = [UnischemaField("a", np.dtype("<f4"), (np.int64(2), 3), NdarrayCodec(), False)]
    odd += [UnischemaField("b", str, (), None, False), UnischemaField("c", np.dtype("M8[ns]"), (), None, True)]
    for protocol in (0, 4):
        (folder / f"odd_protocol{protocol}.pickle").write_bytes(pickle.dumps(Unischema("Odd", odd), protocol))


def main():
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.sql.session.timeZone", "UTC").config("spark.driver.bindAddress", "127.0.0.1")
    spark = builder.config("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS").getOrCreate()
    url = write(spark, "fields", FIELDS, [row(i) for i in range(ROWS)], ["part"])
    np.savez_compressed(HERE / "fields.npz", **oracle(url, FIELDS, REFUSED))
    rows = [{"id": i, "day": f"00{i}", "year": 2000 + i} for i in range(3)]
    write(spark, "folders", FOLDERS, rows, ["day", "year"])
    spark.stop()
    schemas()


if __name__ == "__main__":
    main()
