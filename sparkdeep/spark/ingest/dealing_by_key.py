"""Rows dealt by a column: all rows of one key go to one replica, and replicas get about equally many rows."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping
from typing import Final

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from sparkdeep.errors import ConfigError
from sparkdeep.spark.ingest.tasks import FLAG, HASH
from sparkdeep.spark.session.types import quoted

__all__ = ["KEY", "key_column", "keys_dealt", "repartitioned_by_key"]

_LOG = logging.getLogger("sparkdeep")

KEY: Final = "__sparkdeep_key__"
"""The column of keys: a seeded hash of each; null where a row has none."""

_PLACE: Final = "__sparkdeep_place__"

# Beyond this many keys their counts are not collected: groups of keys are dealt, which are about even then.
_MOST_KEYS: Final = 10_000
_GROUPS: Final = 4096


def key_column(frame: DataFrame, deal_key: str, seed: int) -> Column:
    """The column that `repartitioned_by_key` deals by, from the user's; null is a key like any other.

    Raises:
        ConfigError: there is no such column, or its values cannot be keys.
    """
    kinds = {field.name: field.dataType for field in frame.schema.fields}
    if deal_key not in kinds:
        raise ConfigError(f"deal_key={deal_key!r}: the DataFrame has no such column; it has {list(kinds)}.")
    if not isinstance(kinds[deal_key], T.AtomicType):
        raise ConfigError(
            f"deal_key={deal_key!r} is a column of type {kinds[deal_key].simpleString()}; it must hold numbers, strings, "
            "booleans, dates or bytes."
        )
    return F.xxhash64(F.lit(seed), F.col(quoted(deal_key))).alias(KEY)


def keys_dealt(counts: Mapping[int, int], num_workers: int) -> dict[int, int]:
    """Key -> replica: the largest first, each to the replica that has the fewest rows so far (Graham's rule, 1969).

    No replica then has more than 4/3 of the rows that the best dealing would give the fullest one. Ties are broken by the key's
    hash and the replica's number, so that the same rows and seed give the same dealing.

    Args:
        counts: training rows of every key.
        num_workers: replicas.
    """
    loads = [(0, replica) for replica in range(num_workers)]
    places: dict[int, int] = {}
    for key, rows in sorted(counts.items(), key=lambda one: (-one[1], one[0])):
        load, replica = heapq.heappop(loads)
        places[key] = replica
        heapq.heappush(loads, (load + rows, replica))
    return places


def repartitioned_by_key(rows: DataFrame, num_workers: int, deal_key: str) -> DataFrame:
    """The rows in `num_workers` partitions, without the column of keys. Counts the rows of each key: one job.

    Args:
        rows: with the columns KEY, HASH and FLAG; those without a key (of a second DataFrame that validates) go by their hash.
        num_workers: replicas.
        deal_key: the user's column, for messages.

    Raises:
        ConfigError: there are fewer keys than replicas.
    """
    counts = _counts(rows, _MOST_KEYS + 1)
    if len(counts) > _MOST_KEYS:
        rows = rows.withColumn(KEY, F.pmod(F.col(KEY), F.lit(_GROUPS)))
        counts = _counts(rows, _GROUPS)
    trained = sum(count > 0 for count in counts.values())
    if trained < num_workers:
        raise ConfigError(
            f"deal_key={deal_key!r}: the training rows have {trained} distinct key(s), and num_workers={num_workers}: a replica "
            "would have no rows. Lower num_workers, choose a column with more values, or leave deal_key out."
        )
    places = keys_dealt(counts, num_workers)
    loads = [sum(counts[key] for key, own in places.items() if own == i) for i in range(num_workers)]
    _LOG.info("deal_key=%r: training rows by replica: %s", deal_key, loads)
    spark = rows.sparkSession
    marks = _marks(spark, num_workers)
    table = spark.createDataFrame([(key, marks[own]) for key, own in places.items()], f"{KEY} bigint, {_PLACE} bigint")
    joined = rows.join(F.broadcast(table), on=KEY, how="left")
    anywhere = F.element_at(F.array(*map(F.lit, marks)), (F.pmod(F.col(HASH), F.lit(num_workers)) + 1).cast("int"))
    placed = joined.withColumn(_PLACE, F.coalesce(F.col(_PLACE), anywhere.cast("bigint")))
    return placed.repartition(num_workers, F.col(_PLACE)).drop(KEY, _PLACE)


def _counts(rows: DataFrame, most: int) -> dict[int, int]:
    """Training rows by key, for at most `most` keys."""
    trains = F.sum(F.when(F.col(FLAG), 0).otherwise(1)).alias("rows")
    counted = rows.where(F.col(KEY).isNotNull()).groupBy(KEY).agg(trains).limit(most).collect()
    return {row[KEY]: row["rows"] for row in counted}


def _marks(spark: SparkSession, count: int) -> list[int]:
    """For every partition a value that Spark's own hash sends there: rows cannot be sent to a partition by its number."""
    size = 64 * count
    while True:
        text = f"SELECT transform(sequence(0L, {size}L), v -> pmod(hash(v), {count})) AS places"
        (row,) = spark.sql(text).collect()
        first: dict[int, int] = {}
        for number, place in enumerate(row["places"]):
            first.setdefault(place, number)
        if len(first) == count:
            return [first[i] for i in range(count)]
        size *= 2
