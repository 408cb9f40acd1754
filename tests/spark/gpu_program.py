"""Run in a process and session of its own: placement on a cluster whose GPUs are made up. Prints JSON.

Usage: python gpu_program.py DISCOVERY_SCRIPT
"""

from __future__ import annotations

import json
import os
import sys

import pyarrow as pa
from pyspark import BarrierTaskContext
from pyspark.sql import SparkSession
from spark_models import blob_rows, estimator

from sparkdeep.errors import SparkdeepError
from sparkdeep.spark.session.placement import resolve_device


def devices(batches):
    context = BarrierTaskContext.get()
    for _ in batches:
        pass
    addresses = context.resources()["gpu"].addresses
    seen = [
        resolve_device("auto", addresses, None),
        resolve_device("auto", addresses, "1,0"),
        resolve_device("cpu", addresses, None),
        os.environ.get("CUDA_VISIBLE_DEVICES", "not set by us"),
    ]
    yield pa.RecordBatch.from_pydict({"seen": [json.dumps(seen)]})


def refusal(**options):
    try:
        estimator(**options).fit(frame)
    except SparkdeepError as error:
        return f"{type(error).__name__}: {error}"
    return "it trained"


spark = (
    SparkSession.builder.master("local-cluster[1,2,1024]")
    .config("spark.ui.enabled", "false")
    .config("spark.driver.host", "127.0.0.1")
    .config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.sql.shuffle.partitions", "2")
    .config("spark.python.daemon.module", "sparkdeep.spark.daemon")
    .config("spark.executor.extraJavaOptions", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    .config("spark.worker.resource.gpu.amount", "2")
    .config("spark.worker.resource.gpu.discoveryScript", sys.argv[1])
    .config("spark.executor.resource.gpu.amount", "2")
    .config("spark.executor.resource.gpu.discoveryScript", sys.argv[1])
    .config("spark.task.resource.gpu.amount", "1")
    .getOrCreate()
)
try:
    frame = spark.createDataFrame(blob_rows(40), "id int, pixels array<double>, label bigint")
    placed = spark.range(0, 2, 1, 2).mapInArrow(devices, "seen string", barrier=True).collect()
    answer = {
        "devices": [json.loads(row.seen) for row in placed],
        "cpu": refusal(device="cpu"),
        "auto": refusal(device="auto"),
        "spawned": refusal(device="cpu", worker_process="spawn", gpus_per_worker=1),
        "profile": refusal(device="cpu", num_workers=1, cpus_per_worker=2),
        "too many": refusal(device="cpu", gpus_per_worker=3),
    }
    print("ANSWER " + json.dumps(answer), flush=True)
finally:
    spark.stop()
