"""Where a fit keeps its checkpoints: in `checkpoint_dir`, or, as one fit of a search, in a folder of its own below it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from pyspark.sql import SparkSession
from torch import nn

from sparkdeep.models.program import Program, inner_optimizer
from sparkdeep.rounds.identity import run_identity
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.spark.fit.settings import FitSettings, digest_of
from sparkdeep.spark.ingest.ingest import Ingested
from sparkdeep.spark.model.model import TorchModel
from sparkdeep.spark.session.hadoop import HadoopStore
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.disks import check_room, volume_of
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.opening import Store, open_store
from sparkdeep.tensors.parameters import Layout

__all__ = ["check_checkpoint_room", "checkpoints_of", "least_checkpoint_bytes", "open_folder"]

_LOG = logging.getLogger("sparkdeep")
_SHAPE = (2, 3)


def least_checkpoint_bytes(program: Program, local: LocalSettings, run: RunSettings) -> int:
    """What one checkpoint holds at the least: parameters, each replica's optimizer state and what error feedback keeps."""
    sections = _sections(program)
    copies = 1
    if local.inner_state == "keep":
        copies += sections * run.num_workers
    elif local.inner_state == "average":
        copies += sections
    if local.error_feedback:
        copies += run.num_workers
    return copies * Layout.of(program.model).num_bytes


def check_checkpoint_room(folder: str, checkpoint_bytes: int, keep: int) -> None:
    """Refuse a local folder without room for `keep` checkpoints and one being written; warn of a folder in memory.

    Checkpoints that are there already, and will be replaced, count as room.

    Raises:
        PreflightError: with what is needed and what is free.
    """
    volume = volume_of(folder)
    there = sum(path.stat().st_size for path in Path(folder).glob("rounds/*/*") if path.is_file())
    least = max(checkpoint_bytes, (keep + 1) * checkpoint_bytes - there)
    check_room(
        volume,
        least,
        f"checkpoint_dir={folder!r} with keep_checkpoints={keep}, at {checkpoint_bytes / 1e6:.1f} MB each,",
        "Make room, give a checkpoint_dir on another volume, or lower keep_checkpoints.",
    )
    if volume.in_memory:
        _LOG.warning(
            "checkpoint_dir lies in memory: %s. It counts against the driver's memory and is gone with the machine: give a "
            "folder on a disk or in shared storage",
            volume.described(),
        )


def _sections(program: Program) -> int:
    """State tensors of a parameter's size that the optimizer keeps for each, found out with one of six elements."""
    probe = nn.Parameter(torch.zeros(_SHAPE))
    probe.grad = torch.zeros(_SHAPE)
    try:
        optimizer, _ = inner_optimizer(replace(program, model=nn.ParameterList([probe])))
        optimizer.step()
    except Exception as error:  # noqa: BLE001 (an optimizer for this one model, or that wants a closure: not known then)
        _LOG.debug("the optimizer's state is left out of the estimated size of checkpoints: %s", error)
        return 0
    state = optimizer.state.get(probe, {})
    return sum(isinstance(value, torch.Tensor) and value.shape == probe.shape for value in state.values())


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
    """The checkpoints of this fit, which no fit with other rows or settings may resume; None without `checkpoint_dir`.

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
    # The models of a grid and its folds share one checkpoint_dir, and are fitted in any order, perhaps at the same time.
    store = open_folder(settings, spark, f"search/{digest_of(settings, identity)}" if settings.search else "")
    if store is None:
        return None
    if isinstance(store, LocalStore):
        size = least_checkpoint_bytes(program, settings.local, settings.run)
        check_checkpoint_room(store.uri, size, settings.keep_checkpoints)
    return CheckpointDirectory(store, identity=identity, keep=settings.keep_checkpoints)
