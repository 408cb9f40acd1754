"""deal="partitions": the DataFrame's own partitions become the shards."""

from __future__ import annotations

import pytest
from pyspark.sql import functions as F

from sparkdeep.data.schema import build_schema
from sparkdeep.errors import ConfigError
from sparkdeep.spark.ingest.ingest import dealt
from sparkdeep.spark.ingest.tasks import HASH, numbered
from sparkdeep.spark.session.types import column_types

pytestmark = pytest.mark.spark


def parts_of(frame, num_workers, **options):
    """The rows of each partition, in their order: (x, hash)."""
    schema = build_schema(
        types=column_types(frame.schema, ["x", "y"]), feature_cols="x", label_cols="y", weight_col=None
    )
    rows = dealt(frame, schema, validation=options.pop("validation", None), num_workers=num_workers, seed=1, **options)
    parts = [[] for _ in range(rows.rdd.getNumPartitions())]
    for one in rows.select(F.spark_partition_id().alias("part"), numbered(0), HASH).collect():
        parts[one["part"]].append((one[numbered(0)], one[HASH]))
    return parts


def numbers(spark, parts):
    """A DataFrame of these partitions."""
    rows = spark.sparkContext.parallelize(parts, len(parts)).flatMap(lambda part: [(float(n), n % 2) for n in part])
    return spark.createDataFrame(rows, "x double, y bigint")


def test_partitions_stay_and_only_their_rows_are_put_in_order(spark):
    given = [[3, 1, 2], [9, 8, 7, 6]]
    parts = parts_of(numbers(spark, given), 2, deal="partitions")
    assert [sorted(x for x, _ in part) for part in parts] == [sorted(part) for part in given]
    assert all([h for _, h in part] == sorted(h for _, h in part) for part in parts)
    # Whatever the order in which a partition's rows come, the shard is the same.
    assert parts_of(numbers(spark, [part[::-1] for part in given]), 2, deal="partitions") == parts
    mixed = parts_of(numbers(spark, given), 2)  # dealt by the hash: these rows, other shards
    assert sorted(x for part in mixed for x, _ in part) == sorted(x for part in parts for x, _ in part)
    assert mixed != parts


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**40])
def test_the_hash_is_sparks_own_of_the_seed_and_the_values(spark, seed):
    frame = numbers(spark, [[1, 2, 3]])
    schema = build_schema(
        types=column_types(frame.schema, ["x", "y"]), feature_cols="x", label_cols="y", weight_col=None
    )
    dealt_rows = dealt(frame, schema, validation=None, num_workers=1, seed=seed)
    expected = F.xxhash64(F.lit(seed), F.col(numbered(0)), F.col(numbered(1)))
    assert all(same for (same,) in dealt_rows.select(F.col(HASH) == expected).collect())


def test_partitions_that_cannot_be_kept_are_refused(spark):
    frame = numbers(spark, [[1], [2], [3]])
    with pytest.raises(ConfigError, match=r"has 3 partition\(s\), and num_workers=2.*df.repartition\(2\)"):
        parts_of(frame, 2, deal="partitions")
    with pytest.raises(ConfigError, match="a second DataFrame for validation"):
        parts_of(frame, 3, deal="partitions", validation=frame)
