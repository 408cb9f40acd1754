"""DataFrame to shards: one barrier stage that hashes rows to replicas, sorts them by the hash and writes columns."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cloudpickle
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from sparkdeep.data.columns import Faults
from sparkdeep.data.schema import Callables, Schema
from sparkdeep.data.shards import ShardInfo, decode_rows
from sparkdeep.errors import ConfigError, DataError
from sparkdeep.protocol.messages import ShardFacts
from sparkdeep.spark.ingest.dealing_by_key import KEY, key_column, repartitioned_by_key
from sparkdeep.spark.ingest.tasks import (
    FLAG,
    HASH,
    MANIFEST_COLUMNS,
    PORTION_COLUMNS,
    IngestJob,
    ingest_task,
    numbered,
    portion_ingest_task,
)
from sparkdeep.spark.session.jobs import mapped
from sparkdeep.spark.session.types import quoted, selectable
from sparkdeep.storage.disks import Volume

__all__ = [
    "Ingested",
    "dealt",
    "paths_of",
    "read_manifests",
    "shards_of",
]

_LOG = logging.getLogger("sparkdeep")
_BUCKETS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What ingest learned about the rows."""

    facts: tuple[ShardFacts, ...]
    schema: Schema
    """With dtypes and row shapes as they were seen."""
    sample: dict[str, Any]
    """A few rows, as fields."""
    num_bytes: int


def dealt(
    frame: DataFrame,
    schema: Schema,
    *,
    validation: float | str | DataFrame | None,
    num_workers: int,
    seed: int,
    deal: str = "rows",
    deal_key: str | None = None,
) -> DataFrame:
    """The used columns in `num_workers` partitions, dealt by a seeded hash of the row and sorted by it inside.

    The hash depends on nothing but the row's values and the seed, so that the order in which a shuffle delivers rows
    does not matter, and a rebuilt partition equals the lost one. Equal rows are interchangeable.

    Args:
        frame: the rows.
        schema: the columns used.
        validation: a fraction, a boolean column or a second DataFrame.
        num_workers: replicas.
        seed: of the hash.
        deal: "rows" shuffles every row to the partition that its hash says; "partitions" leaves each row in the partition
            that it is in, of which there must be `num_workers`.
        deal_key: with "rows", a column by which they are dealt in place of the hash: rows of equal key go to the same
            partition, and sorting is still by the hash. A job counts the rows of each key.

    Raises:
        ConfigError: `validation` is not a fraction, a boolean column or a DataFrame with the used columns; or the
            partitions cannot be kept; or `deal_key` is no column of keys, or has fewer keys than there are replicas.
    """
    if deal == "partitions" and isinstance(validation, DataFrame):
        raise ConfigError(
            "deal='partitions' with a second DataFrame for validation: its rows are in no replica's partition. Mark them in a "
            "boolean column, or give a fraction."
        )
    rows = _hashed(frame, schema, validation, seed, deal_key)
    if deal_key is not None:
        rows = repartitioned_by_key(rows, num_workers, deal_key)
    elif deal == "rows":
        rows = rows.repartition(num_workers, F.col(HASH))
    elif (partitions := rows.rdd.getNumPartitions()) != num_workers:
        raise ConfigError(
            f"deal='partitions': the DataFrame has {partitions} partition(s), and num_workers={num_workers}: each replica keeps "
            f"one. Use df.repartition({num_workers}), set num_workers={partitions}, or deal='rows'."
        )
    return rows.sortWithinPartitions(HASH, FLAG)


def _hashed(
    frame: DataFrame, schema: Schema, validation: float | str | DataFrame | None, seed: int, deal_key: str | None
) -> DataFrame:
    """The used columns of all rows, with their hash, whether they validate, and the key that they are dealt by, if any."""
    columns = schema.columns()
    keys = [] if deal_key is None else [key_column(frame, deal_key, seed)]
    rows = frame.select(*_numbered(columns, frame), *_flag_column(frame, validation), *keys)
    if isinstance(validation, DataFrame):
        if missing := [name for name in columns if name not in validation.columns]:
            raise ConfigError(f"the validation DataFrame lacks the columns {missing} that training uses.")
        keyless = [F.lit(None).cast("bigint").alias(KEY)] if keys else []
        held_out = validation.select(*_numbered(columns, validation), F.lit(True).alias(FLAG), *keyless)
        rows = rows.unionByName(held_out)
    # As text: a call to the JVM for each of many columns, and again for each plan, costs the driver more than one expects.
    # The user's own names are not passed that way, as a session may give its own meaning to what is quoted.
    names = ", ".join(numbered(i) for i in range(len(columns)))
    rows = rows.withColumn(HASH, F.expr(f"xxhash64({seed}, {names})"))
    if isinstance(validation, float):
        bucket = f"pmod(xxhash64({seed}, 'validation', {HASH}), {_BUCKETS}) < {round(validation * _BUCKETS)}"
        rows = rows.withColumn(FLAG, F.expr(bucket))
    return rows


def _numbered(columns: Sequence[str], frame: DataFrame) -> list[Column]:
    # mapInArrow takes names for paths: a dot in one would mean a member of a struct. The task restores the names.
    kinds = {field.name: field.dataType for field in frame.schema.fields}
    return [selectable(name, kinds[name]).alias(numbered(i)) for i, name in enumerate(columns)]


def _flag_column(frame: DataFrame, validation: Any) -> list[Column]:
    """The column that says, before there is a hash, whether a row validates; none where the hash decides."""
    if validation is None or isinstance(validation, DataFrame):
        return [F.lit(False).alias(FLAG)]
    if isinstance(validation, str):
        kinds = {field.name: field.dataType for field in frame.schema.fields}
        if validation not in kinds:
            raise DataError(f"validation={validation!r}: the DataFrame has no such column; it has {list(kinds)}.")
        if not isinstance(kinds[validation], T.BooleanType):
            raise ConfigError(
                f"validation={validation!r} is a column of type {kinds[validation].simpleString()}; it must be boolean, true "
                "for rows that validate."
            )
        return [F.col(quoted(validation)).alias(FLAG)]
    if isinstance(validation, float) and 0.0 < validation < 1.0:
        return []
    raise ConfigError(
        f"validation={validation!r}: give a fraction between 0 and 1, the name of a boolean column, or a DataFrame."
    )


def shards_of(
    rows: DataFrame,
    schema: Schema,
    *,
    run: str,
    decode: Callables,
    shard_dir: str | None,
    profile: Any,
    movable: bool = False,
) -> DataFrame:
    """The ingest as a persisted DataFrame of one manifest row per shard; nothing runs yet.

    The persisted partition ties the shard to its executor: later stages prefer that place, and if the executor dies
    Spark's lineage writes just the lost shards again. With `movable` it holds the shard's files as well, unless they are
    in `shard_dir`: Spark then fetches it to wherever a task runs.
    """
    job = IngestJob(run=run, schema=schema, decode=cloudpickle.dumps(decode), shard_dir=shard_dir)
    task, columns = (portion_ingest_task, PORTION_COLUMNS) if movable else (ingest_task, MANIFEST_COLUMNS)
    # The hash has done its work and need not travel.
    return mapped(rows.drop(HASH), partial(task, job), columns, barrier=not movable, profile=profile).persist()


def read_manifests(rows: Sequence[Any], schema: Schema, num_workers: int, *, validated: bool = False) -> Ingested:
    """Check what the ingest tasks report.

    Args:
        rows: of the manifest DataFrame.
        schema: before any row was seen.
        num_workers: replicas.
        validated: whether validation rows were asked for.

    Raises:
        DataError: nulls, NaN, ragged arrays, fewer training rows than replicas, no validation rows though asked for,
            or weights that are all zero.
    """
    manifests = sorted((json.loads(row["manifest"]) for row in rows), key=lambda m: m["replica"])
    infos = [ShardInfo.from_json(m["info"]) for m in manifests]
    _warn_of_memory(manifests)
    faults = Faults()
    for manifest in manifests:
        faults.merge(Faults.from_json(manifest["faults"]))
    faults.raise_if_any()
    total = sum(info.rows["train"] for info in infos)
    if total < num_workers:
        held_out = sum(info.rows["validation"] for info in infos)
        raise DataError(
            f"{total} training row(s) ({held_out} for validation) for num_workers={num_workers}: there must be at least as "
            "many rows as replicas. Lower num_workers, or check the filter that made this DataFrame."
        )
    if validated and not any(info.rows["validation"] for info in infos):
        raise DataError(
            f"validation= was given, but none of the {total} rows is for validation: raise the fraction (rows that are equal "
            "go to the same side), or check the boolean column or DataFrame."
        )
    if all(m["weight"] == 0 for m in manifests):
        raise DataError("the training rows' weights in weight_col are all zero: nothing could be learned from them.")
    for info in infos:
        if sum(info.rows.values()):
            schema = schema.with_seen(info.seen)
    samples = {row["replica"]: bytes(row["sample"]) for row in rows}
    first = next(m["replica"] for m, info in zip(manifests, infos, strict=True) if info.rows["train"])
    return Ingested(
        facts=tuple(ShardFacts(rows=dict(info.rows), digest=info.digest) for info in infos),
        schema=schema,
        sample=decode_rows(samples[first]),
        num_bytes=sum(info.num_bytes for info in infos),
    )


def paths_of(rows: Sequence[Any]) -> tuple[tuple[str, dict[str, int]], ...]:
    """Folder and rows by split of every shard, in order."""
    manifests = sorted((json.loads(row["manifest"]) for row in rows), key=lambda m: m["replica"])
    return tuple((m["path"], dict(ShardInfo.from_json(m["info"]).rows)) for m in manifests)


def _warn_of_memory(manifests: Sequence[dict[str, Any]]) -> None:
    volumes = [Volume(**m["volume"]) for m in manifests]
    if in_memory := [f"replica {i}: {v.described()}" for i, v in enumerate(volumes) if v.in_memory]:
        _LOG.warning(
            "shards lie in memory and count against it: %s%s. Set spark.local.dir to a disk, or give shard_dir=",
            "; ".join(in_memory[:4]),
            ", ..." if len(in_memory) > 4 else "",
        )
