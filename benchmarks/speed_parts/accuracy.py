"""Time to 97 % of handwritten digits: sparkdeep by `sync_every`, beside DistributedDataParallel."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from measuring.processes import together
from measuring.rows import over, row
from torch import nn

from speed_parts.ddp_loop import Goal, train_ddp
from speed_parts.images import Convnet, Images, accuracy, load_images

__all__ = ["measure"]

REPLICAS: Final = 2
TARGET: Final = 0.97
BATCH: Final = 32
SCORE_EVERY: Final = 50
MAX_STEPS: Final = 2_000
LEARNING_RATE: Final = 0.05
DDP: Final = "DDP, gloo, without Spark"
MEASURES: Final = ("rounds", "from the call", "steps", "accuracy", "loss")


def _reached(_loss: float, right: float) -> bool:
    return right >= TARGET


def _optimizer() -> Any:
    return functools.partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9)


def _variants(*, quick: bool) -> dict[str, dict[str, Any]]:
    if quick:
        return {"sparkdeep, sync_every=50": {"sync_every": 50}}
    return {
        "sparkdeep, sync_every=10": {"sync_every": 10},
        "sparkdeep, sync_every=50": {"sync_every": 50},
        "sparkdeep, sync_every=50, overlap=1": {"sync_every": 50, "overlap": 1},
    }


def _ddp(images: Images, seed: int) -> dict[str, float]:
    goal = Goal(
        model=functools.partial(Convnet, images.side),
        optimizer=_optimizer(),
        batch_size=BATCH,
        score_every=SCORE_EVERY,
        max_steps=MAX_STEPS,
        reached=_reached,
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparkdeep-gloo-") as folder:
        last = together(train_ddp, REPLICAS, REPLICAS, f"{folder}/store", images, goal, seed)[0][-1]
    whole = time.perf_counter() - began
    return dict(zip(MEASURES, (last.seconds, whole, last.step, last.accuracy, last.loss), strict=True))


def _sparkdeep(frame: Any, images: Images, seed: int, options: dict[str, Any]) -> dict[str, float]:
    from sparkdeep import TorchEstimator

    torch.manual_seed(seed)
    per_epoch = -(-images.train_rows // REPLICAS // BATCH)
    began, ends = time.perf_counter(), [0.0]

    def watch(record: Any) -> bool:
        ends.append(time.perf_counter())
        return bool(record.metrics) and record.metrics["accuracy"] >= TARGET

    history = (
        TorchEstimator(
            model=Convnet(images.side),
            loss=nn.CrossEntropyLoss(),
            optimizer=_optimizer(),
            feature_cols="pixels",
            label_cols="label",
            num_workers=REPLICAS,
            batch_size=BATCH,
            epochs=-(-MAX_STEPS // per_epoch),
            validation="held_out",
            validate_every=max(1, SCORE_EVERY // options["sync_every"]),
            metrics={"accuracy": accuracy},
            callbacks=[watch],
            seed=seed,
            progress=False,
            **options,
        )
        .fit(frame)
        .history
    )
    scoring = sum(record.validation_seconds for record in history)
    opening = sum(record.stage_seconds for record in history)
    training = sum(record.seconds for record in history) - scoring - opening
    last = [record for record in history if record.metrics][-1]
    steps = max(sum(record.replicas[i].steps for record in history) for i in range(REPLICAS))
    found = (training, ends[-1] - began - scoring, steps, last.metrics["accuracy"], last.metrics["loss"])
    return dict(zip(MEASURES, found, strict=True))


def _frame(spark: Any, images: Images, path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, width = images.pixels.shape
    offsets = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
    pixels = pa.ListArray.from_arrays(offsets, pa.array(images.pixels.reshape(-1)))
    held_out = np.arange(rows) >= images.train_rows
    pq.write_table(pa.table({"pixels": pixels, "label": images.labels, "held_out": held_out}), path)
    return spark.read.parquet(f"file://{path}")


def measure(spark: Any, *, pairs: int, quick: bool, data: Path | None) -> dict[str, Any]:
    """Seconds to the target, seed by seed, with the loss and accuracy that were reached."""
    images = load_images(None if quick else data)
    variants, seeds = _variants(quick=quick), 1 if quick else max(3, min(pairs, 5))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (DDP, *variants)}
    with tempfile.TemporaryDirectory(prefix="sparkdeep-benchmark-") as folder:
        frame = _frame(spark, images, Path(folder) / "images.parquet")
        for seed in range(seeds):
            found[DDP].append(_ddp(images, seed))
            for name, options in variants.items():
                found[name].append(_sparkdeep(frame, images, seed, options))
    rows = []
    titles = {
        "rounds": "s to the target, training only",
        "from the call": "s to the target, from the call",
        "steps": "local steps to the target",
        "accuracy": "accuracy reached",
        "loss": "held-out loss reached",
    }
    for key, unit in titles.items():
        beside = [one[key] for one in found[DDP]]
        for name, several in found.items():
            values = [one[key] for one in several]
            compared = name != DDP and key in {"rounds", "from the call", "steps"}
            rows.append(row(name, unit, values, ratios={DDP: over(values, beside)} if compared else None))
    missed = {name: sum(one["accuracy"] < TARGET for one in several) for name, several in found.items()}
    notes = [
        (
            f"{images.name}, {images.train_rows:,} training rows, {len(images.labels) - images.train_rows:,} held out; a "
            f"convnet of two layers, batch {BATCH} on each of {REPLICAS} replicas, SGD with momentum; {seeds} seeds. Scored "
            f"every {SCORE_EVERY} steps, scoring left out of the clock. Training only: rounds without the stage's opening; "
            "from the call: with ingest and the stage's opening, or with the start of DDP's processes."
        )
    ]
    notes += [f"{name}: {count} of {seeds} did not reach {TARGET:.0%}." for name, count in missed.items() if count]
    return {"title": f"Time to {TARGET:.0%}", "rows": rows, "notes": notes}
