"""What cannot be trained is refused at once, with the value, the rule and the remedy."""

from __future__ import annotations

import time
import types
from functools import partial

import pytest
import torch
from pyspark.sql import functions as F
from spark_models import Affine, Locked, Net, Trap, blob_rows, estimator, regression
from torch import nn

from sparkdeep.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    PreflightError,
    SparkdeepError,
    UserCodeError,
)
from sparkdeep.spark.session.preflight import check_session

pytestmark = pytest.mark.spark

WITHOUT_A_JOB_S = 10.0
WITH_INGEST_S = 60.0  # seconds when the machine is free


def refused(kind, fit, *parts, within_s=WITHOUT_A_JOB_S):
    """The error that `fit` raises: of exactly this kind, soon, and naming every part."""
    began = time.monotonic()
    with pytest.raises(SparkdeepError) as caught:
        fit()
    assert time.monotonic() - began < within_s
    assert type(caught.value) is kind, caught.value
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    return caught.value


def jobs_run(spark):
    """How many Spark jobs were started so far."""
    return spark.sparkContext._jsc.sc().statusStore().jobsList(None).size()


@pytest.mark.fault(rows=[28], phases="PF")
def test_what_the_schema_tells_is_refused_without_a_job(spark, blobs):
    frame = blobs.withColumn("name", F.lit("x")).withColumn("day", F.current_date()).withColumn("raw", F.lit(b"x"))
    before = jobs_run(spark)
    refused(DataError, lambda: estimator(feature_cols="pixel").fit(frame), "'pixel'", "similar: 'pixels'")
    refused(DataError, lambda: estimator(feature_cols=["name"]).fit(frame), "'name'", "string", "StringIndexer")
    refused(DataError, lambda: estimator(feature_cols=["day"]).fit(frame), "'day'", "date", "unix_timestamp")
    refused(ConfigError, lambda: estimator(feature_cols="raw").fit(frame), "'raw'", "decode=")
    twice = frame.select("pixels", "label", F.col("label").alias("label"))
    refused(DataError, lambda: estimator().fit(twice), "'label'", "twice", "rename")
    refused(DataError, lambda: estimator(validation="held").fit(frame), "'held'", "no such column")
    refused(ConfigError, lambda: estimator(validation="name").fit(frame), "'name'", "string", "must be boolean")
    refused(ConfigError, lambda: estimator(validation=1.5).fit(frame), "1.5", "between 0 and 1")
    other = blobs.drop("label")
    refused(ConfigError, lambda: estimator(validation=other).fit(frame), "['label']", "validation DataFrame lacks")
    assert jobs_run(spark) == before


def test_settings_are_refused_when_they_are_made():
    refused(ConfigError, lambda: estimator(batchsize=3), "'batchsize'", "Did you mean 'batch_size'?")
    refused(ConfigError, lambda: estimator(batch_size=0), "batch_size=0", "at least 1")
    refused(ConfigError, lambda: estimator(prediction="softmax"), "'softmax'", "'argmax', 'probability'")
    refused(ConfigError, lambda: estimator(metrics={"f": max}), "metrics=", "validation=0.1")
    refused(ConfigError, lambda: estimator(optimizer=0.1), "optimizer=0.1", "partial(torch.optim.SGD, lr=0.1)")


def test_what_is_no_spark_dataframe_is_refused(blobs):
    local = blobs.limit(2).toPandas()
    refused(ConfigError, lambda: estimator().fit(local), "DataFrame", "spark.createDataFrame")


@pytest.mark.fault(rows=[32], phases="PF")
def test_more_replicas_than_slots_are_refused_before_a_job(spark, blobs):
    before = jobs_run(spark)
    refused(
        PreflightError,
        lambda: estimator(num_workers=3).fit(blobs),
        "num_workers=3",
        "2 slot(s)",
        "Lower num_workers",
        "spark.executor.instances",
    )
    assert jobs_run(spark) == before


@pytest.mark.fault(rows=[35], phases="PF")
def test_cpus_and_gpus_a_worker_name_the_property_on_a_local_master(blobs):
    refused(PreflightError, lambda: estimator(cpus_per_worker=2).fit(blobs), "spark.task.cpus=2", "local master")
    refused(
        PreflightError,
        lambda: estimator(gpus_per_worker=1).fit(blobs),
        "spark.task.resource.gpu.amount=1",
        "device='cuda:0'",
    )


class StandIn:
    """A session with a configuration and nothing else."""

    def __init__(self, **conf):
        values = {key.replace("_", "."): value for key, value in conf.items()}
        get = types.SimpleNamespace(get=values.get)
        self.sparkContext = types.SimpleNamespace(getConf=lambda: get, master="yarn")
        self.conf = types.SimpleNamespace(get=lambda key, default=None: None)


@pytest.mark.fault(rows=[32], phases="PF")
def test_sessions_that_cannot_run_barrier_stages_are_refused():
    refused(
        PreflightError,
        lambda: check_session(StandIn(spark_dynamicAllocation_enabled="true")),
        "spark.dynamicAllocation.enabled=true",
        "spark.dynamicAllocation.enabled=false",
        "spark.executor.instances",
    )
    refused(
        PreflightError,
        lambda: check_session(StandIn(spark_python_worker_killOnIdleTimeout="true")),
        "spark.python.worker.killOnIdleTimeout=true",
        "Set it to false",
    )
    session = {"spark.sql.execution.pyspark.udf.killOnIdleTimeout": "true"}
    refused(
        PreflightError,
        lambda: check_session(StandIn(**session)),
        "spark.sql.execution.pyspark.udf.killOnIdleTimeout=true",
        "Set it to false",
    )
    both = {
        "spark.python.worker.killOnIdleTimeout": "true",
        "spark.sql.execution.pyspark.udf.killOnIdleTimeout": "false",
    }
    check_session(StandIn(**both))
    one = StandIn()
    one.conf.get = lambda key, default=None: session.get(key, default)  # as spark.conf.set() has it
    refused(PreflightError, lambda: check_session(one), "spark.sql.execution.pyspark.udf.killOnIdleTimeout=true")
    check_session(StandIn())


@pytest.mark.fault(rows=[28], phases="LD")
def test_nulls_and_nans_are_counted_by_column_over_all_rows(spark):
    rows = [(None if i % 10 == 0 else 1.0, float("nan") if i % 25 == 0 else 1.0, 0) for i in range(100)]
    frame = spark.createDataFrame(rows, "a double, b double, label bigint")
    refused(
        DataError,
        lambda: estimator(feature_cols=["a", "b"]).fit(frame),
        "column 'a' has 10 null(s)",
        "column 'b' has 4 NaN value(s)",
        "dropna(subset=['a', 'b'])",
        within_s=WITH_INGEST_S,
    )


@pytest.mark.fault(rows=[28], phases="LD")
def test_ragged_arrays_need_collate(spark):
    frame = spark.createDataFrame([([1.0] * (i % 4 + 1), 0) for i in range(40)], "x array<double>, label bigint")
    refused(
        DataError,
        lambda: estimator(feature_cols="x").fit(frame),
        "column 'x' has arrays of 1 to 4 elements",
        "collate=",
        within_s=WITH_INGEST_S,
    )


@pytest.mark.fault(rows=[27], phases="LD")
def test_fewer_rows_than_replicas_are_refused(blobs):
    refused(
        DataError,
        lambda: estimator().fit(blobs.limit(1)),
        "1 training row(s)",
        "num_workers=2",
        "Lower num_workers",
        within_s=WITH_INGEST_S,
    )


def test_a_null_in_the_validation_column_is_refused(blobs):
    frame = blobs.withColumn("held", F.when(F.col("id") > 5, F.lit(False)))
    refused(
        DataError,
        lambda: estimator(validation="held", num_workers=1).fit(frame),
        "6 null(s)",
        "coalesce(col, lit(False))",
        within_s=WITH_INGEST_S,
    )


def squared(output, label):
    return ((output - label) ** 2).mean()


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        (
            {"label_cols": "real"},
            ConfigError,
            ["float32 (7,)", "A loss over classes needs integer labels", "cast('long')"],
        ),
        (
            {"model": partial(Affine, 8), "loss": nn.HuberLoss(), "label_cols": ["label"]},
            ConfigError,
            ["labels int64 (7, 1)", "A loss over numbers needs floating-point labels", "cast('float')"],
        ),
        (
            {"model": partial(Affine, 8), "loss": squared, "label_cols": "real"},
            ConfigError,
            ["would broadcast", "output float32 (7, 1)", "labels float32 (7,)", "label_cols=['name']"],
        ),
        (
            {"model": partial(Affine, 8), "loss": lambda o, y: nn.functional.mse_loss(o, y), "label_cols": "real"},
            ConfigError,
            ["would broadcast", "(7, 1)", "(7,)", "label_cols=['name']"],
        ),
        (
            {"model": partial(Affine, 2), "feature_cols": ["id", "label"]},
            ConfigError,
            ["integer features", "int64 (7, 2)", "preprocess=lambda x: x.float()"],
        ),
        ({"model": partial(Affine, 5)}, UserCodeError, ["Traceback", "features float32 (7, 8)", "first ingested rows"]),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, ConfigError, ["one number a batch", "reduction='mean'"]),
        ({"model": Locked}, PreflightError, ["model.guard", "cannot be pickled", "lazily, on the executor"]),
        ({"model": Locked()}, PreflightError, ["model.guard", "cannot be pickled", "lazily, on the executor"]),
        ({"metrics": {"size": lambda o, y: o}, "validation": 0.1}, UserCodeError, ["metric 'size'", "one number"]),
        ({"prediction": lambda o: "text"}, ConfigError, ["output is str", "prediction=lambda output"]),
    ],
    ids=[
        "classes",
        "numbers",
        "broadcast",
        "broadcast-torch",
        "integers",
        "width",
        "unreduced",
        "lock",
        "lock-made",
        "metric",
        "prediction",
    ],
)
def test_what_the_first_rows_tell_is_refused_before_training(blobs, options, kind, parts):
    frame = blobs.withColumn("real", F.col("label").cast("float"))
    refused(kind, lambda: estimator(**options).fit(frame), *parts, within_s=WITH_INGEST_S)


def test_a_loss_that_lines_the_shapes_up_itself_is_not_taken_for_a_broadcast(blobs):
    frame = blobs.withColumn("real", F.col("label").cast("float"))
    loss = eval("lambda output, label: ((output.squeeze(1) - label) ** 2).mean()")
    assert regression(partial(Affine, 8), loss=loss, label_cols="real").fit(frame).history


@pytest.mark.fault(rows=[1], phases="TR")
def test_an_exception_of_the_users_model_comes_with_its_traceback_first_and_is_not_repeated(spark):
    rows = [([float(i)] + [0.0] * 7, 0) for i in range(400)]
    frame = spark.createDataFrame(rows, "pixels array<double>, label bigint")
    rounds = []
    options = {"model": partial(Trap, 399.0), "sync_every": 2, "callbacks": [rounds.append], "batch_size": 8}
    options["optimizer"] = partial(torch.optim.SGD, lr=1e-9)
    error = refused(UserCodeError, lambda: estimator(**options).fit(frame), within_s=WITH_INGEST_S)
    assert str(error).startswith("Traceback (most recent call last)")
    assert "spark_models.py" in str(error)
    assert "RuntimeError: the mark 399.0 came up" in str(error)
    assert error.replica in {0, 1}
    assert f"replica {error.replica} on {error.host}" in str(error)
    assert error.host in {"127.0.0.1", "localhost"}
    assert all(record.retries == 0 for record in rounds)


@pytest.mark.fault(rows=[19], phases="AV")
def test_a_loss_that_turns_nan_names_round_and_replica(blobs):
    options = {"optimizer": partial(torch.optim.SGD, lr=1e30), "sync_every": 2, "epochs": 3}
    error = refused(
        NonFiniteError, lambda: estimator(**options).fit(blobs), "Lower the learning rate", within_s=WITH_INGEST_S
    )
    assert error.round >= 1
    assert error.replica in {0, 1}
    assert f"round {error.round}" in str(error)
    assert f"replica {error.replica}" in str(error)


def test_a_module_that_executors_lack_is_named_with_the_way_to_ship_it(blobs, tmp_path, monkeypatch):
    (tmp_path / "only_on_the_driver.py").write_text(
        "from torch import nn\nclass Far(nn.Linear):\n    def __init__(self):\n        super().__init__(8, 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_on_the_driver import Far

    refused(
        UserCodeError,
        lambda: estimator(model=Far).fit(blobs),
        "only_on_the_driver",
        "missing on an executor",
        "--py-files",
        within_s=WITH_INGEST_S,
    )


def test_a_prediction_column_that_is_there_already_is_refused(blobs, plain):
    model = plain
    for name in ("prediction", "Prediction"):
        frame = blobs.withColumn(name, F.lit(1))
        refused(ConfigError, lambda frame=frame: model.transform(frame), f"{name!r}", "prediction_col")
    refused(DataError, lambda: model.transform(blobs.drop("pixels")), "['pixels']")


def test_what_transform_cannot_read_names_the_column(spark, plain):
    model = plain
    bad = spark.createDataFrame([([1.0] * 8,), (None,)], "pixels array<double>")
    with pytest.raises(Exception, match=r"DataError: column 'pixels' has 1 null\(s\)"):
        model.transform(bad).collect()
    short = spark.createDataFrame([([1.0] * 5,)], "pixels array<double>")
    with pytest.raises(Exception, match="pixels"):
        model.transform(short).collect()


def test_the_model_on_the_driver_stays_usable_after_a_refusal(blobs):
    own = Net()
    refused(ConfigError, lambda: estimator(model=own, label_cols="pixels").fit(blobs), within_s=WITH_INGEST_S)
    assert own(torch.zeros(1, 8)).shape == (1, 3)
    assert len(blob_rows(3)) == 3
