"""The perceptron of the throughput section: its rows, its plain loop, and that loop in processes without Spark."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from measuring.processes import DEADLINE_S, in_gloo
from torch import Tensor, nn

__all__ = ["BATCH", "LEARNING_RATE", "alone", "ddp", "ddp_of_distributor", "network", "write_rows"]

FEATURES: Final = 784
BATCH: Final = 64
LEARNING_RATE: Final = 0.05
WARM_UP_STEPS: Final = 50


def network() -> nn.Module:
    """The 784-256-256-10 perceptron."""
    return nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def write_rows(folder: Path, total: int) -> None:
    """Write the same seeded rows as plain column files and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    features = generator.standard_normal((total, FEATURES), dtype=np.float32)  # (rows, features) float32
    labels = generator.integers(0, 10, total)  # (rows,) int64
    features.tofile(folder / "features.bin")
    labels.tofile(folder / "labels.bin")
    offsets = pa.array(np.arange(0, features.size + 1, FEATURES, dtype=np.int32))
    column = pa.ListArray.from_arrays(offsets, pa.array(features.reshape(-1)))
    pq.write_table(pa.table({"features": column, "label": labels}), folder / "rows.parquet", row_group_size=4096)


def shuffled_batches(folder: str, rows: int, replica: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Gather batches of one replica's `rows` in a new random order each epoch, from memory-mapped files."""
    start = replica * rows
    features = np.memmap(f"{folder}/features.bin", np.float32, "r").reshape(-1, FEATURES)[start : start + rows]
    labels = np.memmap(f"{folder}/labels.bin", np.int64, "r")[start : start + rows]
    # Plain arrays over the maps: indexing a memmap makes a memmap, which costs more.
    features, labels = np.asarray(features), np.asarray(labels)
    generator = np.random.default_rng(replica)
    per_epoch = rows // BATCH
    for step in range(steps):
        at = step % per_epoch
        if at == 0:
            order = generator.permutation(rows)
        chosen = order[at * BATCH : (at + 1) * BATCH]
        yield torch.from_numpy(features[chosen]), torch.from_numpy(labels[chosen])


def plain_loop(
    model: nn.Module, folder: str, rows: int, replica: int, steps: int, ready: Callable[[], Any]
) -> tuple[float, float]:
    """Train `steps` batches after a warm-up; this replica's rows a second, and its mean loss over its last epoch."""
    torch.set_num_threads(1)
    loss_of = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    began, losses = 0.0, []
    for done, (x, y) in enumerate(shuffled_batches(folder, rows, replica, WARM_UP_STEPS + steps)):
        if done == WARM_UP_STEPS:
            ready()
            began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    rate = steps * BATCH / (time.perf_counter() - began)
    return rate, float(torch.stack(losses[-(rows // BATCH) :]).mean())


def alone(replica: int, barrier: Any, folder: str, rows: int, steps: int) -> tuple[float, float]:
    """One of the processes that never talk; all start their measured part together."""
    return plain_loop(network(), folder, rows, replica, steps, lambda: barrier.wait(DEADLINE_S))


def ddp(replica: int, size: int, store: str, folder: str, rows: int, steps: int) -> tuple[float, float]:
    """One of the processes of gloo's DistributedDataParallel, which synchronizes every step."""
    with in_gloo(replica, size, store):
        model = nn.parallel.DistributedDataParallel(network())
        found = plain_loop(model, folder, rows, replica, steps, dist.barrier)
        dist.barrier()  # whoever leaves first takes its connections along
        return found


def ddp_of_distributor(folder: str, rows: int, steps: int) -> tuple[float, float]:
    """What each process of TorchDistributor runs; rows a second of all, and their mean loss."""
    dist.init_process_group("gloo")
    try:
        model = nn.parallel.DistributedDataParallel(network())
        found = torch.tensor(plain_loop(model, folder, rows, dist.get_rank(), steps, dist.barrier))
        dist.all_reduce(found)
        dist.barrier()
        return float(found[0]), float(found[1]) / dist.get_world_size()
    finally:
        dist.destroy_process_group()
