"""Replicas of different speeds, which sleep in place of slower machines: seconds to equal loss, whoever wins."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from speed_parts.images import Convnet, Images, accuracy, load_images
from torch import Tensor, nn

from algorithm_parts.fits import REPLICAS, frame_of, image_table, run_fit
from algorithm_parts.results import append
from sparkdeep import algorithms

__all__ = ["SPEEDS", "TARGET", "run_speeds", "slowed"]

TARGET: Final = 0.3
"""Of the held-out loss."""
_PAUSES_S: Final = (0.02, 0.02, 0.04, 0.08)
"""A step of a replica, beside what it computes: as machines of speeds 1, 1, 1/2 and 1/4."""
_EPOCHS: Final = 12
_BATCH: Final = 16


def slowed(pixels: Tensor) -> Tensor:
    """Sleep as long as this replica is slow; on Spark, a replica's number is its task's partition."""
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is not None:
        time.sleep(_PAUSES_S[context.partitionId()])
    return pixels


def _sgd(rate: float, momentum: float = 0.0) -> Any:
    return functools.partial(torch.optim.SGD, lr=rate, momentum=momentum)


SPEEDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "averaging, 5 steps": {"algorithm": algorithms.averaging(5), "optimizer": _sgd(0.1, 0.9)},
    "averaging, 0.2 s": {
        "algorithm": algorithms.averaging(5),
        "optimizer": _sgd(0.1, 0.9),
        "time_budget_s": 0.2,
        "validate_every": 2,
    },
    "Downpour, Adagrad": {
        "algorithm": algorithms.downpour(lr=0.03, n_fetch=1, n_push=1, warm_start=0),
        "optimizer": _sgd(0.03),
        "time_budget_s": 0.4,
    },
}
"""Settings by contender: all are scored after 0.4 s or so. Rates are those that were found for digits."""
SHOWN: Final[Mapping[str, str]] = {
    "averaging, 5 steps": "SGD 0.1, momentum 0.9",
    "averaging, 0.2 s": "SGD 0.1, momentum 0.9, FedNova's weights",
    "Downpour, Adagrad": "SGD 0.03, Adagrad 0.03, a fetch and a push a step, windows of 0.4 s",
}
"""What a table says of them."""


def _parts(images: Images, seed: int) -> list[Any]:
    order = np.random.default_rng(seed).permutation(images.train_rows)
    scored = np.array_split(np.arange(images.train_rows, len(images.labels)), REPLICAS)
    return [
        image_table(images, np.concatenate([rows, held_out]), held_out_from=len(rows))
        for rows, held_out in zip(np.array_split(order, REPLICAS), scored, strict=True)
    ]


def _reached(record: Any) -> bool:
    return bool(record.metrics) and record.metrics["loss"] <= TARGET


def run_speeds(names: Sequence[str], seeds: int, out: Path) -> None:
    """Digits, until the target or the end: train every contender with every seed, and add each run to `out`."""
    images = load_images(None)
    schema = "pixels array<float>, label bigint, held_out boolean"
    with tempfile.TemporaryDirectory(prefix="sparkdeep-compare-") as folder:
        for seed in range(seeds):
            frame = frame_of(_parts(images, seed), schema, Path(folder) / f"seed-{seed}")
            for name in names:
                settings = {
                    "model": Convnet,
                    "model_args": {"side": images.side, "channels": 8},
                    "loss": nn.CrossEntropyLoss(),
                    "feature_cols": "pixels",
                    "label_cols": "label",
                    "num_workers": REPLICAS,
                    "batch_size": _BATCH,
                    "epochs": _EPOCHS,
                    "augment": slowed,
                    "deal": "partitions",
                    "validation": "held_out",
                    "validate_every": 1,
                    "metrics": {"accuracy": accuracy},
                    "callbacks": [_reached],
                    "rounds_per_stage": 10_000,
                    "max_stage_s": 600.0,
                    **SPEEDS[name],
                }
                shown = SHOWN[name]
                append(run_fit(frame, part="speeds", name=name, seed=seed, settings=settings, shown=shown), out)
