"""A disk is full: that of the checkpoints, and that of the shards. A small tmpfs, which only root can mount."""

from __future__ import annotations

import os
import subprocess

import pytest
from fault_models import estimator
from fault_runs import verified_rounds

from sparkdeep.errors import CheckpointError, PreflightError, ReplicaLostError

pytestmark = [pytest.mark.cluster, pytest.mark.slow_fault]

SIZE = 8 << 20


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("a tmpfs is mounted by root only")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


def ballast(folder, leaving):
    """Fill the disk up to `leaving` bytes."""
    path = folder / "ballast"
    status = os.statvfs(folder)
    with path.open("wb") as file:
        file.write(bytes(status.f_bavail * status.f_bsize - leaving))
    return path


@pytest.mark.fault(rows=[22], phases="CK")
def test_a_full_checkpoint_disk_keeps_what_is_committed_and_with_room_the_run_goes_on(
    fault_frame, reference, leaks, small_disk
):
    checkpoints = small_disk / "checkpoints"
    filled = []

    def fill(record):
        if record.round == 2 and not filled:
            filled.append(ballast(small_disk, 700_000))  # room for the parameters, not for the replicas' states

    with pytest.raises(CheckpointError) as raised:
        estimator(checkpoint_dir=str(checkpoints), keep_checkpoints=1, callbacks=[fill]).fit(fault_frame)
    message = str(raised.value)
    assert "round 3" in message
    assert "No space left" in message
    assert "Make room" in message
    leaks.check()
    assert verified_rounds(checkpoints) == [2]
    filled[0].unlink()
    trained = []
    model = estimator(
        checkpoint_dir=str(checkpoints), keep_checkpoints=1, callbacks=[lambda r: trained.append(r.round) or False]
    ).fit(fault_frame)
    reference.check(model)
    assert trained == [3, 4, 5, 6, 7, 8]
    leaks.check()
    names = {path.name.partition(".")[0] for path in (checkpoints / "rounds").iterdir()}
    assert names == {"000008"}, "what the full disk kept of round 3 is gone"


@pytest.mark.fault(rows=[22], phases="LD")
def test_a_full_shard_disk_is_named_and_left_as_it_was(fault_frame, leaks, small_disk):
    kept = ballast(small_disk, 16_384)
    # Refused beforehand where the room is looked at first, given up after the retries where it is not.
    with pytest.raises((PreflightError, ReplicaLostError), match=r"(?i)less room|disk is full|No space left on device"):
        estimator(shard_dir=str(small_disk), max_retries=1).fit(fault_frame)
    leaks.check()
    assert [path.name for path in small_disk.iterdir()] == [kept.name]
