"""Volumes: their kind, their room, and what is said when it ends."""

from __future__ import annotations

import errno
import logging
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sparkdeep.errors import DiskFullError, PreflightError
from sparkdeep.models.program import Program
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.spark.fit.checkpoints import check_checkpoint_room, least_checkpoint_bytes
from sparkdeep.storage import disks
from sparkdeep.storage.disks import Volume, check_room, room_for_shards, volume_of

MOUNTS = """\
22 28 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
28 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 28 0:40 / /data rw - ext4 /dev/sdb1 rw
41 28 0:41 / /data rw - nfs4 server:/export rw
42 40 0:42 / /data/with\\040space rw - tmpfs tmpfs rw,size=1024k
43 28 0:43 / /database rw - xfs /dev/sdc rw
44 28 0:44 / /mnt/bucket rw master:1 - fuse.s3fs s3fs rw
malformed
"""


@pytest.fixture
def mounts(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: MOUNTS if str(self) == "/proc/self/mountinfo" else "")


@pytest.mark.parametrize(
    ("folder", "mount", "kind"),
    [
        ("/home/x", "/", "ext4"),
        ("/data", "/data", "nfs4"),
        ("/data/x/y", "/data", "nfs4"),
        ("/data/with space/x", "/data/with space", "tmpfs"),
        ("/database/x", "/database", "xfs"),
        ("/databases", "/", "ext4"),
        ("/mnt/bucket/a", "/mnt/bucket", "fuse.s3fs"),
    ],
)
def test_the_kind_is_that_of_the_nearest_mount_above_the_last_mounted_of_equals(mounts, folder, mount, kind):
    assert disks._mount_of(Path(folder)) == (mount, kind)


def test_without_proc_the_kind_is_not_known(monkeypatch):
    def missing(*_args, **_kwargs):
        raise FileNotFoundError(errno.ENOENT, "no such file")

    monkeypatch.setattr(Path, "read_text", missing)
    volume = volume_of("/")
    assert (volume.mount, volume.kind, volume.in_memory) == ("", "", False)
    assert "an unknown mount, kind unknown;" in volume.described()


def test_a_folder_that_is_not_made_yet_lies_where_it_will_be(tmp_path):
    there, not_yet = volume_of(tmp_path), volume_of(tmp_path / "a" / "b")
    assert (there.mount, there.kind, there.total_bytes) == (not_yet.mount, not_yet.kind, not_yet.total_bytes)
    assert 0 < there.free_bytes <= there.total_bytes
    assert Volume(**there.to_json()) == there


@pytest.mark.parametrize(
    ("kind", "in_memory", "network", "said"),
    [
        ("tmpfs", True, False, "tmpfs, which is memory; 1.0 MiB of 2.0 MiB free"),
        ("nfs4", False, True, "nfs4, over the network;"),
        ("fuse.s3fs", False, True, "fuse.s3fs, over the network;"),
        ("overlay", False, False, "overlay; 1.0 MiB"),
    ],
)
def test_what_a_kind_means(kind, in_memory, network, said):
    volume = Volume(path="/x", mount="/", kind=kind, free_bytes=1 << 20, total_bytes=2 << 20)
    assert (volume.in_memory, volume.network) == (in_memory, network)
    assert said in volume.described()


def small(monkeypatch, free_bytes, kind="ext4"):
    volume = Volume(path="/small", mount="/small", kind=kind, free_bytes=free_bytes, total_bytes=100 << 20)
    for module in ("storage.disks", "spark.fit.checkpoints"):
        monkeypatch.setattr(f"sparkdeep.{module}.volume_of", lambda _path: volume)


def test_too_little_room_is_refused_with_the_volume_and_the_remedy():
    volume = Volume(path="/s", mount="/s", kind="xfs", free_bytes=3 << 20, total_bytes=9 << 20)
    check_room(volume, 3 << 20, "a thing", "Do this.")
    with pytest.raises(
        PreflightError, match=r"a thing needs about 4.0 MiB, .* in /s \(on /s, xfs; 3.0 MiB of .*\)\. Do this"
    ):
        check_room(volume, 4 << 20, "a thing", "Do this.")


def test_a_shard_is_not_begun_where_there_is_next_to_no_room(monkeypatch, tmp_path):
    small(monkeypatch, (16 << 20) - 1)
    with (
        pytest.raises(PreflightError, match=r"a shard needs about 16.0 MiB.*spark.local.dir .*shard_dir="),
        room_for_shards(tmp_path),
    ):
        pytest.fail("it was begun")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_named_and_the_unfinished_shard_removed(tmp_path, number):
    folder = tmp_path / "shard"
    folder.mkdir()
    (folder / "column").write_bytes(b"x")
    said = rf"{os.strerror(number)} in {folder} \(on .*MiB free\).*spark.local.dir"
    with pytest.raises(DiskFullError, match=said), room_for_shards(folder):
        raise OSError(number, os.strerror(number))
    assert not folder.exists()


def test_other_failures_of_a_disk_are_not_called_full(tmp_path):
    with pytest.raises(OSError, match="bad sector"), room_for_shards(tmp_path):
        raise OSError(errno.EIO, "bad sector")
    assert tmp_path.exists()


def program(optimizer):
    return Program(model=nn.Linear(10, 10, bias=False), loss=nn.MSELoss(), optimizer=optimizer)


@pytest.mark.parametrize(
    ("optimizer", "local", "copies"),
    [
        (partial(torch.optim.SGD, lr=0.1), {}, 1),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {}, 1 + 4),
        (partial(torch.optim.AdamW, lr=0.1), {}, 1 + 2 * 4),
        (partial(torch.optim.AdamW, lr=0.1), {"inner_state": "average"}, 1 + 2),
        (partial(torch.optim.AdamW, lr=0.1), {"inner_state": "reset"}, 1),
        (partial(torch.optim.SGD, lr=0.1), {"codec": "int8", "error_feedback": True}, 1 + 4),
        (partial(torch.optim.LBFGS, lr=0.1), {}, 1),  # wants a closure: its state is not known
    ],
)
def test_the_least_size_of_a_checkpoint_counts_parameters_and_replica_states(optimizer, local, copies):
    size = least_checkpoint_bytes(program(optimizer), LocalSettings(**local), RunSettings(num_workers=4))
    assert size == copies * 100 * 4


def test_checkpoints_that_do_not_fit_are_refused_before_anything_trains(monkeypatch, tmp_path):
    small(monkeypatch, 40 << 20)
    check_checkpoint_room(str(tmp_path), 10 << 20, 3)
    with pytest.raises(
        PreflightError,
        match=r"checkpoint_dir='.*' with keep_checkpoints=4, at 10.5 MB each, needs about 50.0 MiB.*lower keep",
    ):
        check_checkpoint_room(str(tmp_path), 10 << 20, 4)


def test_checkpoints_that_are_there_already_count_as_room(monkeypatch, tmp_path):
    small(monkeypatch, 10 << 20)
    with pytest.raises(PreflightError):
        check_checkpoint_room(str(tmp_path), 10 << 20, 2)
    for name in ("000001.a", "000002.b"):
        (tmp_path / "rounds" / name).mkdir(parents=True)
        with (tmp_path / "rounds" / name / "model").open("wb") as file:
            file.truncate(10 << 20)
    check_checkpoint_room(str(tmp_path), 10 << 20, 2)


@pytest.mark.parametrize(("kind", "warned"), [("tmpfs", True), ("ext4", False)])
def test_checkpoints_in_memory_are_warned_of(monkeypatch, tmp_path, caplog, kind, warned):
    small(monkeypatch, 90 << 20, kind)
    with caplog.at_level(logging.WARNING):
        check_checkpoint_room(str(tmp_path), 1 << 20, 3)
    assert ("lies in memory" in caplog.text) == warned
