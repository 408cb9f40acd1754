"""Mixed data: replicas that see other labels, replicas that have fewer rows, and what is done about either."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from speed_parts.images import Convnet, Images, accuracy, load_images
from torch import nn

from algorithm_parts.fits import REPLICAS, frame_of, image_table, run_fit
from algorithm_parts.results import append
from sparkdeep import FedProx, Median, NormClip, Scaffold, TrimmedMean

__all__ = ["MIXED", "run_mixed", "shards_by_label", "shards_of_unlike_sizes"]

_EPOCHS: Final = 15
_BATCH: Final = 16
_RATE: Final = 0.1
_SHARES: Final = (0.6, 0.25, 0.1, 0.05)

_EPOCH: Final = {"sync_every": "epoch"}
_BY_LABEL: Final[Mapping[str, Mapping[str, Any]]] = {
    "averaging, every step": {"sync_every": 1},
    "averaging, 5 steps": {"sync_every": 5},
    "averaging, every epoch": _EPOCH,
    "FedProx(0.1)": {**_EPOCH, "drift_correction": FedProx(0.1)},
    "FedProx(1)": {**_EPOCH, "drift_correction": FedProx(1.0)},
    "Scaffold": {**_EPOCH, "drift_correction": Scaffold()},
    "NormClip": {**_EPOCH, "aggregator": NormClip()},
    "TrimmedMean(0.25)": {**_EPOCH, "aggregator": TrimmedMean(0.25)},
    "Median": {**_EPOCH, "aggregator": Median()},
}
_UNLIKE_SIZES: Final[Mapping[str, Mapping[str, Any]]] = {
    "averaging by rows": _EPOCH,
    "averaging, equal weights": {**_EPOCH, "weighting": "equal"},
    "FedNova": {**_EPOCH, "weighting": "fednova"},
    "Scaffold by rows": {**_EPOCH, "drift_correction": Scaffold()},
}
MIXED: Final[Mapping[str, Mapping[str, Any]]] = {
    **{f"by label: {name}": settings for name, settings in _BY_LABEL.items()},
    **{f"unlike sizes: {name}": settings for name, settings in _UNLIKE_SIZES.items()},
}
"""Settings by scenario and contender."""


def shards_by_label(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Row numbers of each replica, sorted by label and cut in four: most labels are with one replica, some with two."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return list(np.array_split(order[np.argsort(labels[order], kind="stable")], REPLICAS))


def shards_of_unlike_sizes(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Row numbers of each replica: 60, 25, 10 and 5 % of the rows, sorted by label, so that sizes go with labels."""
    order = np.random.default_rng(seed).permutation(len(labels))
    cuts = (np.cumsum(_SHARES)[:-1] * len(labels)).astype(int)
    return list(np.split(order[np.argsort(labels[order], kind="stable")], cuts))


def _parts(images: Images, scenario: str, seed: int) -> list[Any]:
    deal = shards_by_label if scenario == "by label" else shards_of_unlike_sizes
    mine = deal(images.labels[: images.train_rows], seed)
    scored = np.array_split(np.arange(images.train_rows, len(images.labels)), REPLICAS)
    return [
        image_table(images, np.concatenate([rows, held_out]), held_out_from=len(rows))
        for rows, held_out in zip(mine, scored, strict=True)
    ]


def run_mixed(names: Sequence[str], seeds: int, out: Path, epochs: int | None = None) -> None:
    """Digits that are dealt unevenly: train every contender with every seed, and add each run to `out`."""
    images = load_images(None)
    schema = "pixels array<float>, label bigint, held_out boolean"
    with tempfile.TemporaryDirectory(prefix="sparkdeep-compare-") as folder:
        for seed in range(seeds):
            for name in names:
                scenario = name.partition(":")[0]
                path = Path(folder) / f"{scenario.replace(' ', '-')}-{seed}"
                settings = {
                    "model": Convnet,
                    "model_args": {"side": images.side, "channels": 8},
                    "loss": nn.CrossEntropyLoss(),
                    "optimizer": functools.partial(torch.optim.SGD, lr=_RATE),
                    "feature_cols": "pixels",
                    "label_cols": "label",
                    "num_workers": REPLICAS,
                    "batch_size": _BATCH,
                    "epochs": epochs or _EPOCHS,
                    "deal": "partitions",
                    "validation": "held_out",
                    "metrics": {"accuracy": accuracy},
                    **MIXED[name],
                }
                shown = ", ".join(f"{key}={value!r}" for key, value in MIXED[name].items())
                frame = frame_of(_parts(images, scenario, seed), schema, path)
                append(run_fit(frame, part="mixed", name=name, seed=seed, settings=settings, shown=shown), out)
