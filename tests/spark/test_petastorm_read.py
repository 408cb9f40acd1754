"""`sparkdeep.petastorm.read` on datasets that petastorm wrote, held to what petastorm's own reader gave."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from petastorm_oracle import DATA, IMAGES, expected, same
from torch import nn

from sparkdeep import DataError, TorchEstimator, petastorm
from sparkdeep.errors import ConfigError

pytestmark = pytest.mark.spark

FIELDS = f"file://{DATA / 'fields'}"


def names(leave_out):
    return [name for name in expected() if name not in leave_out]


def collected(frame):
    rows = frame.orderBy("id").collect()
    return {name: [row[name] for row in rows] for name in frame.columns}


def test_every_field_equals_petastorms_value(spark):
    zone = spark.conf.get("spark.sql.session.timeZone")
    frame = petastorm.read(spark, FIELDS, names(IMAGES))
    assert dict(frame.dtypes) == {
        "id": "int",
        "part": "string",
        "i8": "tinyint",
        "u8": "smallint",
        "u16": "int",
        "u32": "bigint",
        "i64": "bigint",
        "f16": "float",
        "f32": "float",
        "f64": "double",
        "flag": "boolean",
        "text": "string",
        "money": "decimal(10,3)",
        "when": "timestamp",
        "bare_number": "smallint",
        "bare_text": "string",
        "matrix": "array<array<float>>",
        "matrix_u16": "array<array<int>>",
        "flags": "array<boolean>",
        "columns_first": "array<array<double>>",
        "point": "float",
        "halves": "array<float>",
        "times": "array<timestamp>",
        "vector": "array<int>",
        "words": "array<string>",
        "names": "array<string>",
        "zipped": "array<array<smallint>>",
        "zipped_ragged": "array<smallint>",
    }
    times = ["when", "times"]
    plain = collected(frame.drop(*times))
    for name, values in plain.items():
        same(name, values, expected()[name])
    # Timestamps are instants: compared as microseconds, whatever the session's zone shows.
    micros = collected(
        frame.selectExpr("id", "unix_micros(when) AS when", "transform(times, t -> unix_micros(t)) AS times")
    )
    for name in times:
        same(name, [np.array(value, "M8[us]") for value in micros[name]], expected()[name])
    assert spark.conf.get("spark.sql.session.timeZone") == zone


def test_images_equal_petastorms_values(spark):
    pytest.importorskip("cv2", reason="sparkdeep[images] is not installed")
    for name, values in collected(petastorm.read(spark, FIELDS, ["id", *IMAGES])).items():
        same(name, values, expected()[name])


def test_a_column_that_is_not_used_is_neither_read_nor_decoded(spark, capfd):
    frame = petastorm.read(spark, FIELDS, ["id", "matrix", "zipped"])
    frame.select("id").explain(True)
    plan = capfd.readouterr().out.split("== Physical Plan ==")[1]
    assert "ReadSchema: struct<id:int>" in plan
    assert "Python" not in plan
    frame.select("matrix").explain(True)
    plan = capfd.readouterr().out.split("== Physical Plan ==")[1]
    assert "ReadSchema: struct<matrix:binary>" in plan
    assert "Python" in plan


def test_older_spark_decodes_whole_rows_to_the_same_values(spark, monkeypatch):
    monkeypatch.delattr("pyspark.sql.functions.arrow_udf")
    got = collected(petastorm.read(spark, FIELDS, ["id", "matrix_u16", "vector", "part", "u8"]))
    for name, values in got.items():
        same(name, values, expected()[name])


def test_folders_that_look_like_numbers_keep_the_schemas_type(spark):
    frame = petastorm.read(spark, f"file://{DATA / 'folders'}")
    assert frame.dtypes == [("id", "bigint"), ("day", "string"), ("year", "bigint")]
    assert [tuple(row) for row in frame.orderBy("id").collect()] == [(i, f"00{i}", 2000 + i) for i in range(3)]


def test_read_schema_describes_the_fields(spark):
    schema = petastorm.read_schema(spark, FIELDS)
    assert schema.name == "Fields"
    assert [field.name for field in schema.fields][:3] == ["id", "part", "i8"]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            None,
            DataError,
            r"field 'cloud' \(float32, shape \(None, 3\), NdarrayCodec, stored as binary\) cannot be read",
        ),
        (["waves"], DataError, "field 'waves' .* arrays of complex64 have no type in Spark. Leave it out"),
        (["matrx"], DataError, r"no field 'matrx'\. Did you mean 'matrix'"),
        ("matrix", ConfigError, "a list of field names is needed"),
        ([], ConfigError, "a list of field names is needed"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(spark, fields, error, message):
    with pytest.raises(error, match=message):
        petastorm.read(spark, FIELDS, fields)


def test_a_folder_without_metadata_says_what_to_do(spark, tmp_path):
    shutil.copytree(DATA / "folders", tmp_path / "set")
    (tmp_path / "set" / "_common_metadata").unlink()
    with pytest.raises(DataError, match=r"no file _common_metadata.*petastorm-generate-metadata.*spark.read.parquet"):
        petastorm.read(spark, f"file://{tmp_path}/set")
    with pytest.raises(DataError, match="no file _common_metadata"):
        petastorm.read(spark, f"file://{tmp_path}/nowhere")


def test_the_estimator_trains_on_encoded_columns_as_on_decoded_ones(spark):
    frames = {
        decode: petastorm.read(spark, FIELDS, ["id", "matrix", "flag"], decode=decode) for decode in (True, False)
    }
    assert dict(frames[False].dtypes)["matrix"] == "binary"
    decoders = petastorm.decoders(frames[False].where("id >= 0"))
    assert list(decoders) == ["matrix"]
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    weights, scores = [], []
    for decode, frame in frames.items():
        estimator = TorchEstimator(
            model=network,
            loss=nn.CrossEntropyLoss(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            feature_cols="matrix",
            label_cols="label",
            num_workers=1,
            batch_size=12,  # rows are ordered by a hash of the columns, which differ; one batch holds all
            decode=None if decode else decoders,
            progress=False,
        )
        model = estimator.fit(frame.selectExpr("matrix", "bigint(flag) AS label"))
        weights.append(model.model[1].weight.detach().numpy().copy())
        scores.append([row.prediction for row in model.transform(frame.orderBy("id")).select("prediction").collect()])
    assert not np.allclose(weights[0], network[1].weight.detach().numpy(), rtol=1e-3)
    np.testing.assert_allclose(*weights, rtol=1e-6)
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_decoders_of_a_frame_without_encoded_columns_are_refused(spark):
    with pytest.raises(DataError, match="none of the columns"):
        petastorm.decoders(spark.range(1))
