"""How fast an epoch is read again: from memory beside a numpy gather, from disk beside a sequential read.

python benchmarks/speed_parts/reading.py [--pairs 9] [--quick]

A replica's own path, from shard to tensors, against `features[indices]` on arrays in memory with the same indices; then
a shard of several windows whose pages were dropped from the cache, against reading its files from start to end.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from sparkdeep.data.order import EpochOrder, batch_bounds
from sparkdeep.data.schema import Field, Schema
from sparkdeep.data.shards import Shard, ShardWriter
from sparkdeep.models.program import Program
from sparkdeep.replica.reading import Reader
from sparkdeep.settings.run import LocalSettings

_CHUNK_BYTES: Final = 4 << 20
_BLOCK_ROWS: Final = 4096


def _schema(width: int) -> Schema:
    shared: dict[str, Any] = {"argument": None, "stacked": False, "ragged": False}
    features = Field(name="features", role="features", columns=("features",), dtype="float32", shape=(width,), **shared)
    label = Field(name="label", role="label", columns=("label",), dtype="int64", shape=(), **shared)
    return Schema(fields=(features, label), float_dtype="float32")


def _write(folder: Path, rows: int, width: int) -> Shard:
    """A shard of `rows` rows, `width` float32 and an int64 each; written in parts, so that it may exceed memory."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder, _schema(width)) as writer:
        for start in range(0, rows, 1 << 15):
            n = min(1 << 15, rows - start)
            part = generator.standard_normal((n, width), dtype=np.float32)
            writer.append("train", {"features": part, "label": generator.integers(0, 10, n)})
        writer.close()
    return Shard.open(folder)


def _read(shard: Shard, width: int, batch: int, epoch: int, **settings: Any) -> float:
    """Rows a second of a replica's reader, over one epoch."""
    program = Program(model=nn.Identity(), loss=None, optimizer=torch.optim.SGD)
    local = LocalSettings(batch_size=batch, **settings)
    reader = Reader(program, local, _schema(width), shard, device=torch.device("cpu"), float_dtype=torch.float32)
    rows = 0
    began = time.perf_counter()
    with reader.training(epoch, 0, shard.info.rows["train"]) as steps:
        for [one] in steps:
            rows += one.rows
    return rows / (time.perf_counter() - began)


def _gather(features: Any, labels: Any, batch: int, epoch: int, digest: str) -> float:
    """Rows a second of indexing arrays in memory by the same permutation."""
    order = EpochOrder(len(features), seed=0, epoch=epoch, digest=digest).indices(0, len(features))
    began = time.perf_counter()
    for start, stop in batch_bounds(len(features), batch).tolist():
        chosen = order[start:stop]
        torch.from_numpy(features[chosen])
        torch.from_numpy(labels[chosen])
    return len(features) / (time.perf_counter() - began)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def _drop_cache(folder: Path) -> None:
    """Have the system forget what it keeps of the files in memory."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sequential(folder: Path) -> float:
    """Bytes a second of reading the files from start to end."""
    total = 0
    buffer = bytearray(_CHUNK_BYTES)
    began = time.perf_counter()
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                total += n
    return total / (time.perf_counter() - began)


def _interleaved(pairs: int, first: Callable[[int], float], second: Callable[[int], float]) -> list[list[float]]:
    values: list[list[float]] = [[], []]
    for pair in range(pairs):
        # Every other pair runs backwards, so that a drift of the machine favors nobody.
        for i in (0, 1) if pair % 2 == 0 else (1, 0):
            values[i].append((first, second)[i](pair + 1))
    return values


def _rows(name: str, other: str, unit: str, ours: list[float], theirs: list[float]) -> list[dict[str, Any]]:
    ratios = {other: [a / b for a, b in zip(ours, theirs, strict=True)]}
    return [
        {"name": f"{name}: {other}", "unit": unit, "values": theirs, "ratios": {}},
        {"name": f"{name}: sparkdeep", "unit": unit, "values": ours, "ratios": ratios},
    ]


def measure(*, pairs: int, quick: bool) -> dict[str, Any]:
    """Measure all; JSON-ready.

    Args:
        pairs: of each.
        quick: smaller shards.
    """
    torch.set_num_threads(1)
    scale = 4 if quick else 1
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sparkdeep-reading-") as folder:
        for width, rows in ((784, 64_000 // scale), (40, 400_000 // scale)):
            shard = _write(Path(folder) / f"memory-{width}", rows, width)
            held = shard.take("train", np.arange(rows))
            features, labels = np.asarray(held["features"]), np.asarray(held["label"])
            _read(shard, width, 256, 0)
            for batch in (64, 256):
                gather = functools.partial(_gather, features, labels, batch)
                values = _interleaved(
                    pairs,
                    functools.partial(_read, shard, width, batch),
                    functools.partial(gather, digest=shard.info.digest),
                )
                found += _rows(f"{width} float32, batch {batch}", "gather from memory", "rows/s", *values)
            shard.close()
            del held, features, labels
        found += _from_disk(Path(folder) / "disk", 160_000 // scale, max(1, pairs // 3))
    return {
        "title": "Reading an epoch again",
        "rows": found,
        "notes": [
            f"From disk: pages dropped before each read; blocks of {_BLOCK_ROWS} rows, windows of a tenth of the shard."
        ],
    }


def _from_disk(folder: Path, rows: int, pairs: int) -> list[dict[str, Any]]:
    width = 784
    shard = _write(folder, rows, width)
    window = max(_BLOCK_ROWS, rows // 10)

    def ours(epoch: int) -> float:
        _drop_cache(folder)
        # Pages that a map holds are not dropped: each epoch maps anew.
        mapped = Shard.open(folder)
        _drop_cache(folder)
        rate = _read(mapped, width, 64, epoch, block_rows=_BLOCK_ROWS, window_rows=window)
        mapped.close()
        return rate * mapped.info.num_bytes / rows / 1e6

    def theirs(_epoch: int) -> float:
        _drop_cache(folder)
        return _sequential(folder) / 1e6

    shard.close()
    return _rows(
        f"{shard.info.num_bytes / 1e6:.0f} MB from disk", "sequential read", "MB/s", *_interleaved(pairs, ours, theirs)
    )


def table(section: dict[str, Any]) -> str:
    """A section as Markdown: medians, least to most."""

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"

    lines = [f"### {section['title']}", "", "| | unit | median (least to most) | ratio |", "|---|---|---|---|"]
    for row in section["rows"]:
        ratios = "; ".join(f"{spread(values, 2)} of {name}" for name, values in row["ratios"].items())
        lines.append(f"| {row['name']} | {row['unit']} | {spread(row['values'], 0)} | {ratios} |")
    return "\n".join([*lines, "", *section["notes"]]) + "\n"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print(table(measure(pairs=arguments.pairs, quick=arguments.quick)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
