"""The in-process twin as tests use it: arrays in, a trained module out, no JVM."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch

from sparkdeep.data.schema import Field, Schema
from sparkdeep.data.shards import Shard, ShardWriter
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import ShardFacts
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.stages.coordinator import Coordinator
from sparkdeep.stages.opener import SocketStages
from sparkdeep.testing.in_process import InProcessLauncher


def _kind(array):
    return {"i": "int64", "b": "bool"}.get(array.dtype.kind, str(array.dtype))


def schema_of(x, y=None, w=None):
    parts = [("features", x, "features"), ("label", y, "label"), ("weight", w, "weight")]
    fields = tuple(
        Field(
            name=name,
            role=role,
            argument=None,
            columns=(name,),
            stacked=False,
            dtype=_kind(a),
            ragged=False,
            shape=tuple(a.shape[1:]),
        )
        for name, a, role in parts
        if a is not None
    )
    return Schema(fields=fields, float_dtype="float64" if x.dtype == np.float64 else "float32")


def write_shards(directory: Path, parts, schema, validation=None):
    """`parts[i]` and `validation[i]` are dicts field -> array."""
    paths = []
    for i, fields in enumerate(parts):
        path = directory / f"shard-{i}"
        writer = ShardWriter(path, schema)
        writer.append("train", fields)
        if validation is not None:
            writer.append("validation", validation[i])
        writer.close()
        paths.append(path)
    return paths


def facts_of(paths):
    facts = []
    for path in paths:
        shard = Shard.open(path)
        facts.append(ShardFacts(rows=shard.info.rows, digest=shard.info.digest))
        shard.close()
    return facts


def deal(x, y, sizes, w=None):
    """Contiguous parts of the given sizes."""
    bounds = np.cumsum([0, *sizes])
    parts = []
    for a, b in itertools.pairwise(bounds):
        part = {"features": x[a:b]}
        if y is not None:
            part["label"] = y[a:b]
        if w is not None:
            part["weight"] = w[a:b]
        parts.append(part)
    return parts


_SETTINGS = {f.name for f in dataclasses.fields(RunSettings)}
_LOCAL = {f.name for f in dataclasses.fields(LocalSettings)}


def make_fit(tmp_path, program: Program, parts, schema, *, validation=None, coordinator, wrap=None, **options):
    paths = write_shards(tmp_path / new_run_id(), parts, schema, validation)
    return make_fit_on(tmp_path, program, paths, schema, coordinator=coordinator, wrap=wrap, **options)


def make_fit_on(tmp_path, program, paths, schema, *, coordinator, wrap=None, **options):
    local = LocalSettings(**{k: options.pop(k) for k in list(options) if k in _LOCAL})
    settings = RunSettings(
        num_workers=len(paths),
        **{"retry_backoff_s": 0.01, **{k: options.pop(k) for k in list(options) if k in _SETTINGS}},
    )
    plan = plan_of(program, local, schema, steps=settings.work == "local")
    launcher = InProcessLauncher(plan, paths, tmp_path / f"state-{new_run_id()}")
    return Fit(
        program=program,
        local=local,
        settings=settings,
        plan=plan,
        shards=facts_of(paths),
        stages=SocketStages(launcher=wrap(launcher) if wrap else launcher, coordinator=coordinator),
        run=new_run_id(),
        **options,
    )


def local_coordinator(*, tls=False):
    return Coordinator(bind_host="127.0.0.1", advertised_host="127.0.0.1", ports=range(1), tls=tls)


def run(tmp_path, program, parts, schema, **options):
    """Fit to the end; returns (module, records, fit)."""
    coordinator = local_coordinator()
    try:
        fit = make_fit(tmp_path, program, parts, schema, coordinator=coordinator, **options)
        records = list(fit.rounds())
        fit.load_result()
        return program.model, records, fit
    finally:
        coordinator.close()


def flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])
