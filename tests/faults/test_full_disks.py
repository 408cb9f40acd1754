"""A disk that fills up: a small tmpfs, which only root can mount."""

from __future__ import annotations

import errno
import os
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW
from twin import deal, flat, local_coordinator, make_fit, schema_of
from twin_faults import marked_table

from sparkdeep.data.shards import ShardWriter
from sparkdeep.errors import CheckpointError, DiskFullError, PreflightError
from sparkdeep.models.program import Program
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.disks import room_for_shards, volume_of
from sparkdeep.storage.local import LocalStore

pytestmark = pytest.mark.fault(rows=[22], phases="LD,CK")

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path, request):
    """A tmpfs of so many MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    folder = tmp_path / "small"
    folder.mkdir()
    size = f"size={request.param}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        pytest.skip(f"mount -t tmpfs is refused here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True, timeout=30)


def write(directory, schema, x):
    with room_for_shards(directory), ShardWriter(directory, schema) as writer:
        for _ in range(10):
            writer.append("train", {"features": x})


@pytest.mark.parametrize("small_disk", [24], indirect=True)
def test_a_shard_that_fills_its_disk_is_named_and_removed(small_disk):
    x = np.zeros((1000, 1024), np.float32)  # 4 MB
    schema = schema_of(x)
    directory = small_disk / "sparkdeep-run" / "shard-00000"
    with pytest.raises(DiskFullError) as raised:
        write(directory, schema, x)
    assert f"{directory} (on {small_disk}, tmpfs, which is memory; " in str(raised.value)
    assert "No space left on device" in str(raised.value)
    assert not directory.exists()
    assert volume_of(small_disk).free_bytes > 23 * MIB


@pytest.mark.parametrize("small_disk", [8], indirect=True)
def test_a_shard_is_not_begun_on_a_disk_that_is_all_but_full(small_disk):
    x = np.zeros((1, 4), np.float32)
    with pytest.raises(PreflightError, match=r"a shard needs about 16.0 MiB.*8.0 MiB of 8.0 MiB free"):
        write(small_disk / "shard", schema_of(x), x)
    assert list(small_disk.iterdir()) == []


def go(tmp_path, checkpoints, **options):
    x, y = marked_table([12, 8], features=200)
    torch.manual_seed(3)
    program = Program(
        model=nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 1)),  # 0.24 MB; a checkpoint has 1.2 MB
        loss=nn.MSELoss(),
        optimizer=partial(AdamW, lr=0.01),
    )
    coordinator = local_coordinator()
    try:
        fit = make_fit(
            tmp_path,
            program,
            deal(x, y, [12, 8]),
            schema_of(x, y),
            coordinator=coordinator,
            checkpoints=checkpoints,
            **{"checkpoint_every": 1, "epochs": 2, "batch_size": 4, "sync_every": 1, **options},
        )
        records = list(fit.rounds())
        fit.load_result()
        return flat(program.model), records, fit
    finally:
        coordinator.close()


def directory(folder, keep=9):
    return CheckpointDirectory(LocalStore(folder), identity={}, keep=keep)


@pytest.mark.parametrize("small_disk", [6], indirect=True)
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_when_there_is_room(tmp_path, small_disk):
    expected, _, _ = go(tmp_path, None)
    with pytest.raises(CheckpointError, match=rf"could not be written to .*{os.strerror(errno.ENOSPC)}.*Make room"):
        go(tmp_path, directory(small_disk / "run"))
    kept = directory(small_disk / "run").latest()
    assert 1 <= kept.round_number < 6
    assert not [path for path in small_disk.rglob("*") if path.name.startswith(".tmp-")]
    names = {name.split("/")[1] for name in LocalStore(small_disk / "run").list("rounds")}
    assert len(names) == kept.round_number  # nothing of the one that failed
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True, timeout=30)
    values, _, fit = go(tmp_path, directory(small_disk / "run"))
    assert fit.resumed_from == kept.round_number
    assert torch.equal(values, expected)


@pytest.mark.spark
@pytest.mark.parametrize("small_disk", [24], indirect=True)
def test_a_fit_whose_shards_fill_the_disk_ends_at_once_and_leaves_nothing(spark, small_disk):
    from pyspark.sql import functions as F

    from sparkdeep import TorchEstimator

    columns = [F.array_repeat(F.rand(seed=1).cast("float"), 256).alias("x"), F.rand(seed=2).alias("y")]
    frame = spark.range(0, 60_000, 1, 2).select(*columns)  # 61 MB
    estimator = TorchEstimator(
        model=nn.Linear(256, 1),
        loss=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        feature_cols="x",
        label_cols="y",
        num_workers=2,
        shard_dir=str(small_disk),
        progress=False,
    )
    with pytest.raises(DiskFullError, match=r"No space left.*tmpfs, which is memory; .* of 24.0 MiB free.*shard_dir="):
        estimator.fit(frame)
    assert list(Path(small_disk).iterdir()) == []
