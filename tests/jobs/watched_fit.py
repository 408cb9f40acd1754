"""A program with a Spark UI of its own: fits once for each number of rounds a stage, and prints what the UI says."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from functools import partial

import torch
from pyspark.sql import SparkSession
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


def descriptions(spark):
    """The fit's jobs since the last call, oldest first."""
    context = spark.sparkContext
    address = f"{context.uiWebUrl}/api/v1/applications/{context.applicationId}/jobs"
    with urllib.request.urlopen(address, timeout=30) as answer:
        jobs = sorted(json.load(answer), key=lambda job: job["jobId"])
    told = [job.get("description", "") for job in jobs if job["jobId"] > descriptions.last]
    descriptions.last = max(job["jobId"] for job in jobs)
    return [text for text in told if text.startswith("sparkdeep fit: ")]


descriptions.last = -1


def main():
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.port", "0")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    frame = spark.range(160).selectExpr("double(id % 7) AS a", "double(id % 5) AS b", "double(id % 3) AS c").cache()
    found = {}
    for name, options in {
        "fixed": {"rounds_per_stage": 20},
        "auto": {"rounds_per_stage": "auto", "max_stage_s": 1.0},
        "callback": {"callbacks": [needs_spark]},
    }.items():
        model = fit(frame, **options)
        starts = [record.round for record in model.history if record.stage_seconds > 0]
        found[name] = {"told": descriptions(spark), "starts": starts, "rounds": len(model.history)}
    spark.stop()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
