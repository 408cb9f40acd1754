"""Throughput of sparkdeep beside its ceiling and beside pyspark's TorchDistributor, in one run.

spark-submit jobs/benchmark.py [--pairs 9] [--quick] [--output runs/benchmark]

One network, batch, optimizer and data set, two replicas of one thread each on local[2]. Every pair measures, one after
the other: `ceiling`, the same loop with the same shuffled gather in two processes that never talk; `sparkdeep`, rounds
2 and later of an open barrier stage; `distributor`, TorchDistributor with DDP. Prints a table of medians and ratios
within pairs, and writes it with the hardware, the versions and the commit as benchmark.md and benchmark.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

REPLICAS: Final = 2
ROWS: Final = 32_000  # of each replica
FEATURES: Final = 784
BATCH: Final = 64
SYNC_EVERY: Final = 50
LEARNING_RATE: Final = 0.05
WARM_UP_STEPS: Final = 50
PROCESS_TIMEOUT_S: Final = 600.0


def network() -> nn.Module:
    """The 784-256-256-10 perceptron."""
    return nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def write_data(folder: Path) -> None:
    """Write the same seeded rows as plain column files and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    total = REPLICAS * ROWS
    features = generator.standard_normal((total, FEATURES), dtype=np.float32)  # (rows, features) float32
    labels = generator.integers(0, 10, total)  # (rows,) int64
    features.tofile(folder / "features.bin")
    labels.tofile(folder / "labels.bin")
    offsets = pa.array(np.arange(0, features.size + 1, FEATURES, dtype=np.int32))
    column = pa.ListArray.from_arrays(offsets, pa.array(features.reshape(-1)))
    pq.write_table(pa.table({"features": column, "label": labels}), folder / "rows.parquet", row_group_size=4096)


def shuffled_batches(folder: str, replica: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Gather batches of one replica's rows in a new random order each epoch, from memory-mapped files."""
    start = replica * ROWS
    features = np.memmap(f"{folder}/features.bin", np.float32, "r").reshape(-1, FEATURES)[start : start + ROWS]
    labels = np.memmap(f"{folder}/labels.bin", np.int64, "r")[start : start + ROWS]
    # Plain arrays over the maps: indexing a memmap makes a memmap, which costs more.
    features, labels = np.asarray(features), np.asarray(labels)
    generator = np.random.default_rng(replica)
    per_epoch = ROWS // BATCH
    for step in range(steps):
        at = step % per_epoch
        if at == 0:
            order = generator.permutation(ROWS)
        chosen = order[at * BATCH : (at + 1) * BATCH]
        yield torch.from_numpy(features[chosen]), torch.from_numpy(labels[chosen])


def plain_loop(model: nn.Module, folder: str, replica: int, steps: int, ready: Callable[[], Any]) -> float:
    """Train `steps` batches after a warm-up, and return this replica's rows a second."""
    torch.set_num_threads(1)
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    began = 0.0
    for done, (x, y) in enumerate(shuffled_batches(folder, replica, WARM_UP_STEPS + steps)):
        if done == WARM_UP_STEPS:
            ready()
            began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss(model(x), y).backward()
        optimizer.step()
    return steps * BATCH / (time.perf_counter() - began)


def ceiling_process(folder: str, replica: int, steps: int, barrier: Any, rates: Any) -> None:
    """One of the processes that never talk; both start their measured part together."""
    rates.put(plain_loop(network(), folder, replica, steps, lambda: barrier.wait(PROCESS_TIMEOUT_S)))


def measure_ceiling(folder: str, steps: int) -> float:
    """Rows a second of the independent processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(REPLICAS), context.Queue()
    processes = [
        context.Process(target=ceiling_process, args=(folder, i, steps, barrier, rates), daemon=True)
        for i in range(REPLICAS)
    ]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=PROCESS_TIMEOUT_S) for _ in processes)
    for process in processes:
        process.join(timeout=PROCESS_TIMEOUT_S)
    return float(total)


def measure_sparkdeep(frame: Any, epochs: int, records: list[dict[str, float]]) -> float:
    """Rows a second of rounds 2 and later, by the clock between the first record and the last."""
    from sparkdeep import TorchEstimator

    ends: list[float] = []
    estimator = TorchEstimator(
        model=network,
        loss=nn.CrossEntropyLoss(),
        optimizer=functools.partial(torch.optim.SGD, lr=LEARNING_RATE),
        feature_cols="features",
        label_cols="label",
        num_workers=REPLICAS,
        batch_size=BATCH,
        epochs=epochs,
        sync_every=SYNC_EVERY,
        rounds_per_stage=1_000_000,
        max_stage_s=PROCESS_TIMEOUT_S,
        callbacks=[lambda _record: ends.append(time.perf_counter())],
        progress=False,
    )
    rounds = estimator.fit(frame).history[1:]
    if any(record.stage_seconds or record.retries for record in rounds):
        raise RuntimeError("a stage was opened or repeated in the measured part: run again on a quiet machine")
    parts = {"whole": "seconds", "compute": "compute_seconds", "exchange": "exchange_seconds", "outer": "outer_seconds"}
    medians_s = {name: statistics.median(record[part] for record in rounds) for name, part in parts.items()}
    medians_s["input"] = statistics.median(replica.input_seconds for record in rounds for replica in record.replicas)
    records.append({f"{name}_ms": round(1e3 * value, 3) for name, value in medians_s.items()})
    rows: int = sum(record.rows for record in rounds)
    return rows / (ends[-1] - ends[0])


def ddp_loop(folder: str, steps: int) -> float:
    """What each process of TorchDistributor runs; returns the rows a second of all."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        model = nn.parallel.DistributedDataParallel(network())
        rate = torch.tensor(plain_loop(model, folder, dist.get_rank(), steps, dist.barrier))
        dist.all_reduce(rate)
        dist.barrier()  # whoever leaves first takes its connections along
        return float(rate)
    finally:
        dist.destroy_process_group()


def measure_distributor(folder: str, steps: int) -> float:
    """Rows a second of pyspark's own way to train torch."""
    from pyspark.ml.torch.distributor import TorchDistributor

    distributor = TorchDistributor(num_processes=REPLICAS, local_mode=True, use_gpu=False)
    return float(distributor.run(ddp_loop, folder, steps))


def surroundings() -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    import pyspark

    import sparkdeep

    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607 (whichever git the user has)
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyspark": pyspark.__version__,
        "sparkdeep": sparkdeep.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def spread(values: list[float], digits: int) -> str:
    """Median with the smallest and largest value."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def report(rates: dict[str, list[float]], rounds: list[dict[str, float]], about: dict[str, Any]) -> str:
    """The table, in Markdown."""
    names = {"ceiling": "two processes that never talk", "distributor": "TorchDistributor with DDP"}
    lines = [
        (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores, Python {about['python']}, torch {about['torch']}, "
            f"Spark {about['pyspark']}, commit {about['commit']}; {len(rounds)} pairs, median (least to most)"
        ),
        "",
        "| | rows/s | sparkdeep / it |",
        "|---|---|---|",
        f"| sparkdeep | {spread(rates['sparkdeep'], 0)} | |",
    ]
    for name, text in names.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["sparkdeep"], rates[name], strict=True)]
        lines.append(f"| {text} | {spread(rates[name], 0)} | {spread(ratios, 2)} |")
    parts = {name: statistics.median(record[name] for record in rounds) for name in rounds[0]}
    lines += ["", "A round of sparkdeep, medians: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 pairs of a third of the length")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    pairs, epochs = (3, 2) if arguments.quick else (arguments.pairs, 6)
    steps = epochs * ROWS // BATCH

    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{REPLICAS}]").config("spark.ui.enabled", "false")
    session = builder.appName("sparkdeep benchmark").getOrCreate()
    rates: dict[str, list[float]] = {"ceiling": [], "sparkdeep": [], "distributor": []}
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="sparkdeep-benchmark-") as folder:
        write_data(Path(folder))
        frame = session.read.parquet(f"file://{folder}/rows.parquet")
        measures: list[tuple[str, Callable[[], float]]] = [
            ("ceiling", lambda: measure_ceiling(folder, steps)),
            ("sparkdeep", lambda: measure_sparkdeep(frame, epochs, rounds)),
            ("distributor", lambda: measure_distributor(folder, steps // 3)),
        ]
        for pair in range(pairs):
            # Every other pair runs backwards, so that a drift of the machine favours nobody.
            for name, measure in measures if pair % 2 == 0 else reversed(measures):
                rates[name].append(measure())
            print(f"pair {pair + 1}: " + ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items()))
    session.stop()
    about = surroundings()
    text = report(rates, rounds, about)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "benchmark.md").write_text(text, encoding="utf-8")
    content = {**about, "rows_per_second": rates, "rounds_ms": rounds}
    (arguments.output / "benchmark.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
