"""Handwriting: every contender with the same passes over the same rows, scored on rows that it does not train on."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from speed_parts.images import Convnet, Images, accuracy, load_images
from torch import nn

from algorithm_parts.contenders import CONTENDERS, TUNED, TUNING_SEED, grid, settings_of
from algorithm_parts.fits import frame_of, image_table, run_fit, spark_session
from algorithm_parts.results import Run, append

__all__ = ["DATASETS", "Dataset", "images_of", "run_images", "tune_images"]

_TRIES: Final = 3  # a single one picks rates by luck
_SCHEMA: Final = "pixels array<float>, label bigint, held_out boolean"


@final
@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How a data set is trained on."""

    epochs: int
    batch_size: int
    channels: int


DATASETS: Final = {
    "digits": Dataset(epochs=10, batch_size=16, channels=8),
    "mnist10k": Dataset(epochs=2, batch_size=16, channels=8),
}


def images_of(name: str, data: Path | None, *, tuning: bool) -> Images:
    """A data set; for tuning without its test rows, of the others a fifth held out in their place."""
    images = load_images(data if name == "mnist10k" else None)
    if not tuning:
        return images
    rows = images.train_rows
    return dataclasses.replace(
        images, pixels=images.pixels[:rows], labels=images.labels[:rows], train_rows=2 * (rows * 2 // 5)
    )


def _frame(images: Images, folder: Path) -> Any:
    return frame_of(
        [image_table(images, np.arange(len(images.labels)), held_out_from=images.train_rows)], _SCHEMA, folder
    )


def _fit(
    frame: Any, images: Images, part: str, name: str, seed: int, rates: tuple[float, float], dataset: Dataset
) -> Run:
    own = settings_of(CONTENDERS[name], rates)
    settings = {
        "model": Convnet,
        "model_args": {"side": images.side, "channels": dataset.channels},
        "loss": nn.CrossEntropyLoss(),
        "feature_cols": "pixels",
        "label_cols": "label",
        "batch_size": dataset.batch_size,
        "validation": "held_out",
        "metrics": {"accuracy": accuracy},
        "aggregation": "star",
        **own,
    }
    if "epochs" not in own["algorithm"].settings:
        settings["epochs"] = dataset.epochs
    return run_fit(frame, part=part, name=name, seed=seed, settings=settings, shown=_shown(name, rates))


def _shown(name: str, rates: tuple[float, float]) -> str:
    parts = [f"{word} {rate:g}" for word, rate in zip(("inner", "outer"), rates, strict=True) if rate]
    return ", ".join(parts) or CONTENDERS[name].what


def run_images(
    part: str, names: Sequence[str], seeds: int, data: Path | None, out: Path, epochs: int | None = None
) -> None:
    """Train every contender with every seed, and add each run to `out`.

    Args:
        part: of `DATASETS`.
        names: of `CONTENDERS`.
        seeds: how many, from 0.
        data: folder with mnist10k.parquet.
        out: for the results.
        epochs: in place of the data set's.
    """
    dataset = dataclasses.replace(DATASETS[part], epochs=epochs or DATASETS[part].epochs)
    images = images_of(part, data, tuning=False)
    with tempfile.TemporaryDirectory(prefix="sparkdeep-compare-") as folder:
        frame = _frame(images, Path(folder)).cache()
        for seed in range(seeds):
            for name in names:
                append(_fit(frame, images, part, name, seed, TUNED[part][name], dataset), out)


def tune_images(part: str, names: Sequence[str], data: Path | None, out: Path) -> dict[str, tuple[float, float]]:
    """The most accurate rates by contender, each tried with three seeds on rows of their own; runs are added to `out`/tuning."""
    dataset, images = DATASETS[part], images_of(part, data, tuning=True)
    best = {}
    with tempfile.TemporaryDirectory(prefix="sparkdeep-compare-") as folder:
        frame = _frame(images, Path(folder)).cache()
        for name in names:
            found = {}
            for rates in grid(CONTENDERS[name]):
                tried = [_fit(frame, images, part, name, TUNING_SEED + i, rates, dataset) for i in range(_TRIES)]
                for run in tried:
                    append(dataclasses.replace(run, name=f"{name}: {run.settings}"), out / "tuning")
                found[rates] = statistics.mean(run.last.accuracy or 0.0 for run in tried)
                print(f"  {tried[0].settings}: mean accuracy {found[rates]:.4f}", flush=True)
            best[name] = max(found, key=lambda rates: found[rates])
            print(f"{part} {name}: best inner, outer {best[name]}", flush=True)
    spark_session().catalog.clearCache()
    return best
