"""Datasets that petastorm wrote, or that petastorm reads: as sources of `TorchEstimator.fit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sparkdeep.spark.petastorm_source import PetastormSource

__all__ = ["open"]


def open(
    url: str | Sequence[str],
    *,
    reader: Literal["make_reader", "make_batch_reader"] = "make_reader",
    fields: Sequence[str] | None = None,
    timeout_s: float = 300.0,
    **options: Any,
) -> PetastormSource:
    """Name a dataset that replicas read through petastorm's own reader; `TorchEstimator.fit` takes the result.

    Row groups are dealt to replicas whole: number i, in petastorm's order, goes to replica i % num_workers. Each row is
    read once, into the replica's shard; the estimator shuffles there. petastorm unpickles the schema that is stored with
    a dataset, so open only datasets that you trust.

    Args:
        url: folder of the dataset, with its scheme, or a list of Parquet files.
        reader: "make_reader" for datasets that petastorm wrote, "make_batch_reader" for other Parquet.
        fields: those that may be used; None for every field that a tensor can be made of.
        timeout_s: a reader that gives nothing for so long has failed.
        **options: further arguments of that reader, such as predicate, transform_spec, storage_options, workers_count.

    Raises:
        ConfigError: a setting is unknown, or set by sparkdeep itself.
    """
    from sparkdeep.spark.petastorm_source import open_source

    return open_source(url, reader=reader, fields=fields, timeout_s=timeout_s, **options)
