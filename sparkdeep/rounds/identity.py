"""The identity of a run: compared when one is resumed, which is refused with a diff where it differs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparkdeep.models.likeness import details_of
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import ShardFacts
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.storage.own_names import name_of
from sparkdeep.tensors.parameters import Layout, named_tensors, raw_bytes

__all__ = ["describe", "run_identity", "tensors_digest"]


def describe(value: Any) -> Any:
    """A JSON value that differs when a factory, loss or callable visibly differs.

    Classes and functions go by name (see `own_names`), a partial by its parts, a module by its class, its plain settings and its
    tensors. The body of a function is not examined.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if isinstance(value, nn.Module):
        plain = {k: v for k, v in vars(value).items() if isinstance(v, bool | int | float | str) and k != "training"}
        return [name_of(type(value)), plain, tensors_digest(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": name_of(type(value))} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.blake2b(_bytes(value), digest_size=8).hexdigest()]
    return name_of(value) if hasattr(value, "__qualname__") else name_of(type(value))


def tensors_digest(module: nn.Module) -> str:
    """16 hexadecimal digits over the module's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in named_tensors(module):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def run_identity(
    program: Program,
    local: LocalSettings,
    run: RunSettings,
    shards: Sequence[ShardFacts],
    *,
    schema: Mapping[str, Any],
    outer_optimizer: Any,
    warm_start: nn.Module | None,
) -> dict[str, Any]:
    """Everything on which the committed rounds of a run depend, except `epochs`: a finished run may be made longer."""
    return {
        "layout": Layout.of(program.model).fingerprint(),
        "schema": schema,
        "shards": [[shard.digest, shard.rows] for shard in shards],
        "num_workers": run.num_workers,
        "sync_every": run.sync_every,
        "rounds": [run.time_budget_s is not None, run.shares, run.on_nonfinite],
        "algorithm": [describe(one) for one in (run.work, run.schedule, run.asynchronous, run.aggregator)],
        "drift_correction": describe(local.drift_correction),
        "batch_size": local.batch_size,
        "accumulate_batches": local.accumulate_batches,
        "clip_grad_norm": local.clip_grad_norm,
        "precision": local.precision,
        "inner_state": local.inner_state,
        "exchange": [
            local.codec,
            local.down_codec,
            local.error_feedback,
            local.overlap,
            # The number of fragments in which it travels does not change a bit.
            local.overlap_mix,
        ],
        "seed": local.seed,
        "window": [local.block_rows, local.window_rows],
        "loss": describe(program.loss),
        "training_step": describe(program.training_step),
        "optimizer": describe(program.optimizer),
        "lr_scheduler": describe(program.lr_scheduler),
        "outer_optimizer": describe(outer_optimizer),
        "preprocess": describe(program.preprocess),
        "augment": describe(program.augment),
        # Without the fresh parameters: those of a module instance differ whenever a script builds it anew after a crash.
        "warm_start": None if warm_start is None else tensors_digest(warm_start),
        "buffers": describe(program.buffers or {}),
        "details": details_of(program),
    }


def _bytes(tensor: Tensor) -> memoryview:
    return raw_bytes(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8))
