"""Replicas that read through petastorm itself: values, row groups without overlap, training, and what is refused."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from conftest import GROUPS, ROWS
from lts_rows import Stuck, row, settings, write_samples
from petastorm.predicates import in_set
from petastorm.transform import TransformSpec
from petastorm.unischema import UnischemaField
from pyspark.sql import functions as F

from sparkdeep import TorchEstimator, petastorm
from sparkdeep.errors import ConfigError, DataError

pytestmark = pytest.mark.lts


def parts_of(frame, column="id"):
    """The values of a column, partition by partition."""
    found = frame.select(F.spark_partition_id().alias("part"), column).collect()
    parts = [[] for _ in range(frame.rdd.getNumPartitions())]
    for one in found:
        parts[one["part"]].append(one[column])
    return parts


def weights(model):
    return torch.cat([value.reshape(-1) for value in model.model.state_dict().values()])


def test_every_kind_of_field_has_the_value_that_was_written(spark, samples):
    frame = petastorm.open(samples).dataframe(spark, 2)
    assert "name" not in frame.columns  # a string: no tensor
    types = dict(frame.dtypes)
    assert (types["small"], types["price"], types["half"]) == ("smallint", "double", "array<float>")
    assert (types["image"], types["boxes"]) == ("array<array<array<smallint>>>", "array<array<double>>")
    found = {one["id"]: one.asDict() for one in frame.collect()}
    assert sorted(found) == list(range(ROWS))
    for number, got in found.items():
        expected = row(number)
        for name in ("small", "third", "label"):
            assert got[name] == expected[name]
        assert got["price"] == float(expected["price"])
        for name in ("x", "half", "image", "trace", "boxes"):
            if expected[name] is None:
                assert got[name] is None
            else:
                want = expected[name]
                assert np.array_equal(np.array(got[name], want.dtype).reshape(want.shape), want), (number, name)


@pytest.mark.parametrize("num_workers", [1, 2, 3, GROUPS])
def test_row_groups_go_to_replicas_without_overlap_and_none_is_left(spark, samples, num_workers):
    source = petastorm.open(samples, fields=["id"])
    parts = parts_of(source.dataframe(spark, num_workers))
    assert sorted(number for part in parts for number in part) == list(range(ROWS))  # all, and none twice
    assert all(parts)
    # Which rows lie in which row group, by pyarrow alone.
    import pyarrow.parquet as pq

    shares = source.row_groups(num_workers)
    assert sorted(group for share in shares for group in share) == sorted(source.row_groups(1)[0])
    for part, share in zip(parts, shares, strict=True):
        stored = [pq.ParquetFile(g.path).read_row_group(g.index, columns=["id"])["id"].to_pylist() for g in share]
        assert sorted(part) == sorted(number for one in stored for number in one)


def test_a_file_of_several_row_groups_is_shared(spark, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(70))}), tmp_path / "one.parquet", row_group_size=10)
    source = petastorm.open(str(tmp_path), reader="make_batch_reader")
    assert [[group.index for group in share] for share in source.row_groups(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    parts = parts_of(source.dataframe(spark, 3))
    assert [sorted(part) for part in parts] == [
        [*range(10), *range(30, 40), *range(60, 70)],
        [*range(10, 20), *range(40, 50)],
        [*range(20, 30), *range(50, 60)],
    ]


def test_a_fit_is_that_of_a_dataframe_with_the_same_partitions_whatever_the_order_of_threads(spark, samples):
    source = petastorm.open(samples)
    model = TorchEstimator(**settings()).fit(source)
    again = TorchEstimator(**settings()).fit(petastorm.open(samples, workers_count=1))
    assert torch.equal(weights(model), weights(again))
    # The oracle: the same rows, in the partitions that petastorm's rule gives them, backwards, without petastorm.
    numbers = parts_of(source.dataframe(spark, 2, ["id"]))
    made = spark.sparkContext.parallelize(
        [[(row(n)["x"].tolist(), int(row(n)["label"])) for n in reversed(part)] for part in numbers], 2
    ).flatMap(lambda part: part)
    frame = spark.createDataFrame(made, "x array<array<float>>, label bigint")
    assert torch.equal(weights(TorchEstimator(**settings(deal="partitions")).fit(frame)), weights(model))
    other = TorchEstimator(**settings()).fit(frame)  # rows dealt by their hash: other shards, another model
    assert not torch.equal(weights(other), weights(model))


def test_it_learns_with_validation_and_scores_a_dataframe(spark, samples):
    estimator = TorchEstimator(**settings(epochs=40, validation=0.2, prediction="argmax"))
    model = estimator.fit(petastorm.open(samples))
    losses = [record.loss for record in model.history]
    assert losses[-1] < 0.5 * losses[0]
    frame = petastorm.open(samples, fields=["id", "x", "label"]).dataframe(spark, 2)
    right = model.transform(frame).selectExpr("avg(double(label = prediction))").first()[0]
    assert right > 0.9


def test_a_boolean_column_says_which_rows_validate(samples):
    model = TorchEstimator(**settings(validation="third")).fit(petastorm.open(samples))
    assert model.history[-1].metrics["loss"] > 0
    assert sum(record.rows for record in model.history) == 3 * (ROWS - ROWS // 3)


def test_predicates_and_transforms_of_petastorm_apply(spark, samples):
    kept = petastorm.open(samples, predicate=in_set({3, 4, 41}, "id"), fields=["id"]).dataframe(spark, 2)
    assert sorted(number for part in parts_of(kept) for number in part) == [3, 4, 41]
    # The predicate's field need not be among those that are used, nor those that go into a transform.
    few = petastorm.open(samples, predicate=in_set({3, 4, 41}, "id"), fields=["label"]).dataframe(spark, 2)
    assert (few.columns, few.count()) == (["label"], 3)
    total = UnischemaField("total", np.float64, (), None, False)
    spec = TransformSpec(
        lambda values: {"id": values["id"] * 2, "total": values["x"].sum()},
        edit_fields=[total],
        selected_fields=["id", "total"],
    )
    summed = petastorm.open(samples, transform_spec=spec, fields=["id", "total"]).dataframe(spark, 2).collect()
    assert sorted(one["id"] for one in summed) == list(range(0, 2 * ROWS, 2))
    assert all(one["total"] == row(one["id"] // 2)["x"].sum() for one in summed)


def test_plain_parquet_through_make_batch_reader(spark, plain):
    frame = petastorm.open(plain, reader="make_batch_reader").dataframe(spark, 2)
    assert dict(frame.dtypes) == {
        "id": "bigint",
        "holes": "int",
        "x": "array<float>",
        "third": "boolean",
        "label": "bigint",
    }
    for one in frame.collect():
        n = one["id"]
        assert one["holes"] == (None if n % 4 == 0 else n)
        assert (one["third"], one["label"]) == (n % 3 == 0, n % 3)
        assert np.array_equal(np.array(one["x"], np.float32), np.array([n / 10, n % 3, n % 5], np.float32))
    numbers = parts_of(frame)
    assert sorted(n for part in numbers for n in part) == list(range(ROWS))
    options = settings(model_args={"inputs": 3, "classes": 3}, feature_cols="x", epochs=2)
    assert TorchEstimator(**options).fit(petastorm.open(plain, reader="make_batch_reader")).history


def test_a_row_group_that_petastorm_loses_at_the_end_is_read(plain, monkeypatch):
    """Its pool looks whether the workers are idle, then whether all was handed out; here all is handed out between."""
    from petastorm import make_batch_reader
    from petastorm.workers_pool.thread_pool import ThreadPool
    from petastorm.workers_pool.ventilator import ConcurrentVentilator

    from sparkdeep.data.petastorm.reading import inspect, read_share

    look, hand_out = ThreadPool.all_workers_done, ConcurrentVentilator._ventilate
    looked, handed_out = threading.Event(), threading.Event()

    def slow_look(self):
        idle = look(self)
        if not looked.is_set():
            looked.set()
            assert handed_out.wait(10)
        return idle

    def late(self):
        assert looked.wait(10)
        hand_out(self)
        handed_out.set()

    monkeypatch.setattr(ThreadPool, "all_workers_done", slow_look)
    monkeypatch.setattr(ConcurrentVentilator, "_ventilate", late)
    with make_batch_reader(plain, num_epochs=1, shuffle_row_groups=False) as reader:
        assert list(reader) == []  # petastorm by itself
    looked.clear()
    handed_out.clear()
    dataset = petastorm.open(plain, reader="make_batch_reader").dataset
    contents = inspect(dataset)
    batches = list(read_share(dataset, [contents.columns["id"]], 0, 1, contents.digest()))
    assert sorted(n for batch in batches for n in batch["id"].to_pylist()) == list(range(ROWS))


def test_fewer_row_groups_than_replicas(samples):
    with pytest.raises(
        DataError, match=rf"{GROUPS} row group.s. for num_workers={GROUPS + 1}.*Set num_workers={GROUPS}"
    ):
        petastorm.open(samples).row_groups(GROUPS + 1)


def test_a_dataset_that_changes_between_driver_and_replicas_is_noticed(spark, tmp_path):
    url = f"file://{tmp_path}/moving"
    spark.range(0, 8, 1, 4).write.parquet(url)
    frame = petastorm.open(url, reader="make_batch_reader").dataframe(spark, 2)
    assert frame.count() == 8
    spark.range(8, 10, 1, 1).write.mode("append").parquet(url)
    with pytest.raises(Exception, match=r"5 row group.s. here that are not those the driver saw"):
        frame.count()


def test_a_reader_that_hangs_meets_its_deadline(samples):
    source = petastorm.open(samples, predicate=Stuck("id"), timeout_s=1.5)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"make_reader gave nothing of .* for 1\.5 s"):
        TorchEstimator(**settings()).fit(source)
    assert time.monotonic() - began < 15


def test_what_cannot_be_meant_is_refused_by_name(spark, samples, tmp_path):
    with pytest.raises(DataError, match="'name' is string, which cannot become a tensor"):
        TorchEstimator(**settings(feature_cols="name")).fit(petastorm.open(samples))
    with pytest.raises(DataError, match=r"no field 'lable'\. Did you mean 'label'"):
        TorchEstimator(**settings(label_cols="lable")).fit(petastorm.open(samples))
    with pytest.raises(DataError, match=r"columns \['label'\] are not among fields"):
        TorchEstimator(**settings()).fit(petastorm.open(samples, fields=["x"]))
    with pytest.raises(ConfigError, match="cur_shard=0 is set by sparkdeep"):
        petastorm.open(samples, cur_shard=0)
    with pytest.raises(ConfigError, match="reader_pool_type='process' is set by sparkdeep"):
        petastorm.open(samples, reader_pool_type="process")
    with pytest.raises(ConfigError, match="reader='make_readr'"):
        petastorm.open(samples, reader="make_readr")
    with pytest.raises(DataError, match="make_reader failed on file:///nowhere/at/all"):
        petastorm.open("/nowhere/at/all").dataframe(spark, 2)
    with pytest.raises(ConfigError, match="a second DataFrame for validation"):
        TorchEstimator(**settings(validation=spark.range(1))).fit(petastorm.open(samples))


def test_rows_of_another_shape_than_the_schema_says_are_named(spark, tmp_path):
    from petastorm.codecs import ScalarCodec
    from petastorm.unischema import Unischema, UnischemaField
    from pyspark.sql import types as T

    # A plain column declared as a field of two dimensions.
    schema = Unischema("Wrong", [UnischemaField("x", np.float32, (2, 2), ScalarCodec(T.FloatType()), False)])
    url = f"file://{tmp_path}/wrong"
    write_samples(spark, url, rows=4, files=2, schema=schema, make=lambda n: (float(n),))
    with pytest.raises(Exception, match="'x' cannot be read as 2-dimensional float"):
        petastorm.open(url).dataframe(spark, 2).collect()
