"""Made-up runs for tests of the report: a few rounds to many, with gaps, retries and hosts."""

from __future__ import annotations

import math
import random

from sparkdeep.tracking.records import ReplicaRecord, RoundRecord
from sparkdeep.tracking.report import About

SETTINGS = {
    "batch_size": 32,
    "epochs": 12,
    "feature_cols": ["pixels"],
    "label_cols": "label",
    "loss": ["torch.nn.modules.loss.CrossEntropyLoss", {"reduction": "mean"}, "00"],
    "max_stage_s": 60.0,
    "model": "digits:Net",
    "num_workers": 3,
    "optimizer": ["torch.optim.sgd.SGD", [], {"lr": 0.1, "momentum": 0.9}],
    "rounds_per_stage": "auto",
    "sync_every": 10,
    "validation": 0.1,
    "weight_col": None,
}


def rounds(count=120, *, replicas=3, hosts=2, nan=(), retried=()):
    """Rounds of a run that learns; the time of each is the sum of its parts and 0.8 ms."""
    draw, records = random.Random(0), []
    for k in range(1, count + 1):
        compute = [0.060 * (1 + 0.1 * i) + draw.random() * 0.01 for i in range(replicas)]
        exchange = 0.004 + draw.random() * 0.002
        stage = 0.4 if k == 1 else 0.2 if k % 40 == 1 else 0.0
        scored, kept = k % 10 == 0, k % 20 == 0
        spent = max(compute) + exchange + 0.001 + stage + 0.08 * scored + 0.05 * kept
        learned = math.exp(-k / 25)
        records.append(
            RoundRecord(
                round=k,
                epoch=(k - 1) // 10 + 1,
                rows=640 * replicas,
                loss=math.nan if k in nan else 2.27 * learned + 0.03 + draw.random() * 0.05,
                metrics={"loss": 2.2 * learned + 0.06, "accuracy": 1 - 0.9 * math.exp(-k / 20)} if scored else {},
                seconds=spent + 0.0008,
                compute_seconds=max(compute),
                exchange_seconds=exchange,
                outer_seconds=0.001,
                stage_seconds=stage,
                validation_seconds=0.08 * scored,
                checkpoint_seconds=0.05 * kept,
                retries=int(k in retried),
                replicas=[
                    ReplicaRecord(
                        replica=i,
                        host=f"worker-{i % hosts}.cluster.example",
                        rows=640,
                        weight=640.0,
                        steps=10,
                        compute_seconds=seconds,
                        input_seconds=0.06 * seconds,
                    )
                    for i, seconds in enumerate(compute)
                ],
            )
        )
    return records


def about(**changes):
    return About(
        **{
            "title": "digits",
            "status": "done",
            "num_rounds": 120,
            "rows": 19_200,
            "num_parameters": 9_962,
            "scores": {"accuracy": 0.9886},
            "settings": SETTINGS,
            **changes,
        }
    )
