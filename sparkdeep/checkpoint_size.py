"""How large a run's checkpoints will be, and whether the folder has room for them: asked before anything trains."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from sparkdeep.config import LocalSettings, RunSettings
from sparkdeep.disks import check_room, volume_of
from sparkdeep.parameters import Layout
from sparkdeep.program import Program, inner_optimizer

__all__ = ["check_checkpoint_room", "least_checkpoint_bytes"]

_LOG = logging.getLogger("sparkdeep")
_SHAPE = (2, 3)


def least_checkpoint_bytes(program: Program, local: LocalSettings, run: RunSettings) -> int:
    """What one checkpoint holds at the least: parameters, each replica's optimizer state and what error feedback kept."""
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
    """Refuse a local folder without room for `keep` checkpoints and the one in the making; warn of one in memory.

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
    """State tensors of a parameter's size that the optimizer keeps for each: found out on one of six elements."""
    probe = nn.Parameter(torch.zeros(_SHAPE))
    probe.grad = torch.zeros(_SHAPE)
    try:
        optimizer, _ = inner_optimizer(program, [probe])
        optimizer.step()
    except Exception as error:  # noqa: BLE001 (an optimizer for this one model, or that wants a closure: not known then)
        _LOG.debug("the optimizer's state is left out of the estimated size of checkpoints: %s", error)
        return 0
    state = optimizer.state.get(probe, {})
    return sum(isinstance(value, torch.Tensor) and value.shape == probe.shape for value in state.values())
