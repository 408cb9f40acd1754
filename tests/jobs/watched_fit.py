"""Fits once for each number of rounds a stage, and tells what the session's UI says of it."""

from __future__ import annotations

import json
import time
import urllib.request
from functools import partial

import torch
from torch import nn

from sparkdeep import TorchEstimator


def slowly(features):
    time.sleep(0.02)
    return features


def fit(frame, callbacks=(), **options):
    return TorchEstimator(
        model=nn.Linear,
        model_args={"in_features": 2, "out_features": 1},
        loss=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        feature_cols=["a", "b"],
        label_cols=["c"],
        num_workers=2,
        batch_size=8,
        epochs=10,
        sync_every=2,
        preprocess=slowly,
        progress=False,
        callbacks=list(callbacks),
        **options,
    ).fit(frame)


def needs_spark(record):
    return record.round == 3


needs_spark.needs_spark = True


def descriptions(spark, last):
    """The fit's jobs after the job `last`, oldest first, and the last one."""
    context = spark.sparkContext
    address = f"{context.uiWebUrl}/api/v1/applications/{context.applicationId}/jobs"
    with urllib.request.urlopen(address, timeout=30) as answer:
        jobs = sorted(json.load(answer), key=lambda job: job["jobId"])
    told = [job.get("description", "") for job in jobs if job["jobId"] > last]
    return [text for text in told if text.startswith("sparkdeep fit: ")], max(job["jobId"] for job in jobs)


def watched(spark):
    """Of each fit: what the UI tells, the first rounds of its stages, and the number of its rounds."""
    frame = spark.range(160).selectExpr("double(id % 7) AS a", "double(id % 5) AS b", "double(id % 3) AS c").cache()
    frame.count()
    _, last = descriptions(spark, -1)
    found = {}
    for name, options in {
        "fixed": {"rounds_per_stage": 20},
        "auto": {"rounds_per_stage": "auto", "max_stage_s": 1.0},
        "callback": {"callbacks": [needs_spark]},
    }.items():
        model = fit(frame, **options)
        starts = [record.round for record in model.history if record.stage_seconds > 0]
        told, last = descriptions(spark, last)
        found[name] = {"told": told, "starts": starts, "rounds": len(model.history)}
    return found
