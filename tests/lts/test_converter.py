"""petastorm's SparkDatasetConverter on Spark 3.5: by itself, and handed to `fit`."""

from __future__ import annotations

import pytest
import torch
from lts_rows import settings
from petastorm.spark import SparkDatasetConverter, make_spark_converter

from sparkdeep import TorchEstimator
from sparkdeep.errors import DataError

pytestmark = pytest.mark.lts

ROWS = 48


@pytest.fixture
def converter(spark, tmp_path):
    spark.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, f"file://{tmp_path}")
    frame = spark.range(0, ROWS, 1, 4).selectExpr(
        "id", "array(id / 10, id % 3, id % 5) AS x", "cast(id % 3 > 0 as bigint) AS label"
    )
    made = make_spark_converter(frame)  # float32, as its default is
    yield made
    made.delete()


def test_the_converter_itself_gives_every_row_once_by_shards(converter):
    found = []
    options = {"batch_size": 5, "num_epochs": 1, "shard_count": 2}
    for shard in range(2):
        # petastorm may lose row groups when it shuffles them: see test_petastorm_open.py
        with converter.make_torch_dataloader(cur_shard=shard, shuffle_row_groups=False, **options) as loader:
            found.append([int(number) for batch in loader for number in batch["id"]])
    assert sorted(found[0] + found[1]) == list(range(ROWS))
    assert all(found)


def test_a_fit_reads_the_converters_files(converter):
    options = settings(model_args={"inputs": 3, "classes": 2}, epochs=8)
    model = TorchEstimator(**options).fit(converter)
    assert sum(record.rows for record in model.history) == 8 * ROWS
    assert model.history[-1].loss < model.history[0].loss
    assert next(model.model.parameters()).dtype == torch.float32


def test_a_converter_whose_files_are_deleted_is_refused_by_name(converter):
    import shutil

    shutil.rmtree(converter.cache_dir_url.removeprefix("file://"))
    with pytest.raises(DataError, match=r"make_batch_reader failed on file:.* and 3 more file"):
        TorchEstimator(**settings(model_args={"inputs": 3})).fit(converter)
