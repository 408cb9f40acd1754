"""deal_key: rows of one key in one replica's shard, replicas about even, the same for the same rows and seed."""

from __future__ import annotations

import pytest
from pyspark.sql import functions as F
from spark_models import estimator

from sparkdeep.data.schema import build_schema
from sparkdeep.errors import ConfigError
from sparkdeep.spark.ingest import dealing_by_key
from sparkdeep.spark.ingest.ingest import dealt
from sparkdeep.spark.ingest.tasks import FLAG, HASH, numbered
from sparkdeep.spark.session.types import column_types

pytestmark = [pytest.mark.spark, pytest.mark.algorithms]

SIZES = {"anna": 9, "bert": 7, "cora": 4, "dora": 3, None: 2}
# The largest first, to the emptiest of two: 9 + 3 and 7 + 4 + 2.
PAIRS = [{"anna", "dora"}, {"bert", "cora", None}]


@pytest.fixture(scope="module")
def people(spark):
    """Rows (who, x, y, held): so many of each."""
    who = [name for name, count in SIZES.items() for _ in range(count)]
    rows = [(name, float(i), i % 2, i % 5 == 0) for i, name in enumerate(who)]
    return spark.createDataFrame(rows, "`who is` string, x double, y bigint, held boolean").coalesce(2).cache()


def parts_of(frame, num_workers, *, validation=None, seed=1, deal_key="who is"):
    """The rows of each partition, in their order: (x, validates, hash)."""
    types = column_types(frame.schema, ["x", "y"])
    schema = build_schema(types=types, feature_cols="x", label_cols="y", weight_col=None)
    rows = dealt(frame, schema, validation=validation, num_workers=num_workers, seed=seed, deal_key=deal_key)
    assert set(rows.columns) == {numbered(0), numbered(1), FLAG, HASH}
    parts = [[] for _ in range(rows.rdd.getNumPartitions())]
    for one in rows.select(F.spark_partition_id().alias("part"), numbered(0), FLAG, HASH).collect():
        parts[one["part"]].append((one[numbered(0)], one[FLAG], one[HASH]))
    return parts


def names_in(parts):
    who = [name for name, count in SIZES.items() for _ in range(count)]
    return [{who[int(x)] for x, _, _ in part} for part in parts]


def test_rows_of_a_key_are_together_sorted_by_their_hash_and_the_dealing_is_the_same_again(people):
    parts = parts_of(people, 2)
    assert names_in(parts) == PAIRS
    assert [len(part) for part in parts] == [12, 13]
    assert all([h for *_, h in part] == sorted(h for *_, h in part) for part in parts)
    assert parts_of(people.repartition(3), 2) == parts
    by_hash = parts_of(people, 2, deal_key=None)
    assert sorted(x for part in by_hash for x, *_ in part) == sorted(x for part in parts for x, *_ in part)
    assert not names_in(by_hash)[0].isdisjoint(names_in(by_hash)[1]), "without it, keys are on both"


def test_every_replica_has_a_key_where_there_are_as_many_and_fewer_are_refused(people):
    assert sorted(len(part) for part in parts_of(people, 5, seed=3)) == sorted(SIZES.values())
    with pytest.raises(
        ConfigError, match=r"deal_key='who is': the training rows have 5 distinct key\(s\), and num_workers=6"
    ):
        parts_of(people, 6)
    # A key whose rows all validate trains nobody.
    held = people.withColumn("held", F.col("who is").isin("anna", "bert"))
    with pytest.raises(ConfigError, match=r"have 3 distinct key\(s\), and num_workers=4.*Lower num_workers"):
        parts_of(held, 4, validation="held")


def test_validation_rows_go_with_their_key_or_anywhere_where_they_have_none(people):
    for validation in ("held", 0.3):
        parts = parts_of(people, 2, validation=validation)
        assert sum(flag for part in parts for _, flag, _ in part) > 0
        names = names_in(parts)
        assert names[0].isdisjoint(names[1])
    other = people.select("x", "y").where("x < 12")
    parts = parts_of(people, 2, validation=other)
    assert names_in([[one for one in part if not one[1]] for part in parts]) == PAIRS
    held = [sum(flag for _, flag, _ in part) for part in parts]
    assert sum(held) == 12
    assert min(held) > 0


def test_many_keys_are_dealt_in_groups(spark, monkeypatch):
    monkeypatch.setattr(dealing_by_key, "_MOST_KEYS", 20)
    monkeypatch.setattr(dealing_by_key, "_GROUPS", 16)
    frame = spark.range(0, 300, 1, 2).selectExpr("id div 3 AS user", "CAST(id AS double) AS x", "id % 2 AS y")
    parts = parts_of(frame, 2, deal_key="user")
    users = [{int(x) // 3 for x, *_ in part} for part in parts]
    assert users[0].isdisjoint(users[1])
    assert len(users[0] | users[1]) == 100
    assert min(len(part) for part in parts) > 100


def test_what_is_no_column_of_keys_is_refused(people):
    with pytest.raises(ConfigError, match=r"deal_key='wo': the DataFrame has no such column; it has \['who is', 'x'"):
        parts_of(people, 2, deal_key="wo")
    frame = people.withColumn("pair", F.array("x", "y"))
    with pytest.raises(ConfigError, match=r"deal_key='pair' is a column of type array<double>; it must hold"):
        parts_of(frame, 2, deal_key="pair")


def test_a_fit_trains_on_shards_of_whole_keys(blobs):
    sizes = sorted(row["count"] for row in blobs.groupBy("label").count().collect())
    model = estimator(deal_key="label", epochs=1, sync_every="epoch").fit(blobs)
    rows = sorted(part.rows for part in model.history[-1].replicas)
    assert len(sizes) == 3
    assert rows == sorted([sizes[2], sizes[0] + sizes[1]])
