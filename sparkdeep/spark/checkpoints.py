"""Where a fit keeps its checkpoints: in `checkpoint_dir`, or, as one fit of a search, in a folder of its own below it."""

from __future__ import annotations

import os

from pyspark.sql import SparkSession

from sparkdeep.checkpoint import CheckpointDirectory
from sparkdeep.checkpoint_size import check_checkpoint_room, least_checkpoint_bytes
from sparkdeep.identity import run_identity
from sparkdeep.program import Program
from sparkdeep.spark.hadoop import HadoopStore
from sparkdeep.spark.ingest import Ingested
from sparkdeep.spark.model import TorchModel
from sparkdeep.spark.settings import FitSettings, digest_of
from sparkdeep.store import LocalStore, Store, open_store

__all__ = ["checkpoints_of", "open_folder"]


def open_folder(settings: FitSettings, spark: SparkSession, below: str = "") -> Store | None:
    """`checkpoint_dir`, or the folder `below` it; None where none was given.

    Raises:
        ConfigError: it cannot be opened.
    """
    if settings.checkpoint_dir is None:
        return None
    path = os.fspath(settings.checkpoint_dir)
    return open_store(f"{path.rstrip('/')}/{below}" if below else path, fallback=lambda uri: HadoopStore(spark, uri))


def checkpoints_of(
    settings: FitSettings, spark: SparkSession, program: Program, ingested: Ingested, warm_start: TorchModel | None
) -> CheckpointDirectory | None:
    """The checkpoints of this fit, which no fit with other rows or settings goes on with; None without `checkpoint_dir`.

    Raises:
        PreflightError: a local folder without room for them.
    """
    if settings.checkpoint_dir is None:
        return None
    identity = run_identity(
        program,
        settings.local,
        settings.run,
        ingested.facts,
        schema=ingested.schema.to_json(),
        outer_optimizer=settings.outer_optimizer,
        warm_start=None if warm_start is None else warm_start.model,
    )
    # The models of a grid and of folds are fitted with one checkpoint_dir, in any order, perhaps at the same time.
    store = open_folder(settings, spark, f"search/{digest_of(settings, identity)}" if settings.search else "")
    if store is None:
        return None
    if isinstance(store, LocalStore):
        size = least_checkpoint_bytes(program, settings.local, settings.run)
        check_checkpoint_room(store.uri, size, settings.keep_checkpoints)
    return CheckpointDirectory(store, identity=identity, keep=settings.keep_checkpoints)
