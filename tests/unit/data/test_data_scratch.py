from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparkdeep.data import scratch
from sparkdeep.data import scratch as owner_module
from sparkdeep.data.scratch import Owner, claim, is_dead, owner_of_this_process, release, sweep
from sparkdeep.errors import ConfigError

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")

CLAIM = "import sys; from sparkdeep.data.scratch import claim; print(claim([sys.argv[1]], sys.argv[2]), flush=True)"


def claim_in_process_that_ends(local_dir, run_id="run") -> Path:
    local_dir.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", CLAIM, str(local_dir), run_id], capture_output=True, text=True, timeout=60, check=True
    )
    return Path(done.stdout.strip())


def change_owner(path, **changes):
    file = path / "owner.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_claim_makes_a_private_folder_with_its_owner(tmp_path):
    path = claim([str(tmp_path)], "run-1")
    assert path == tmp_path / "sparkdeep-run-1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "owner.json").stat().st_mode) == 0o600
    assert Owner.from_json(json.loads((path / "owner.json").read_text())) == owner_of_this_process()
    assert [entry.name for entry in tmp_path.iterdir()] == ["sparkdeep-run-1"]


def test_claiming_again_gives_the_same_folder_even_when_another_disk_is_roomier_now(tmp_path, monkeypatch):
    free = {"a": 10, "b": 20}
    for name in free:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(
        scratch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[Path(path).name])
    )
    dirs = [str(tmp_path / "missing"), str(tmp_path / "a"), str(tmp_path / "b")]
    first = claim(dirs, "run")
    (first / "shard").mkdir()
    assert first.parent.name == "b"
    free["a"] = 30
    assert claim(dirs, "run") == first
    assert claim(dirs, "other").parent.name == "a"
    assert (first / "shard").is_dir()


def test_workers_of_one_executor_claim_one_folder_at_the_same_time(tmp_path):
    start, got = threading.Barrier(8), []

    def work():
        start.wait(timeout=10)
        got.append(claim([str(tmp_path)], "run"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert got == [tmp_path / "sparkdeep-run"] * 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["sparkdeep-run"]


def test_two_executors_that_share_a_directory_get_folders_of_their_own(tmp_path):
    first = claim_in_process_that_ends(tmp_path)
    second = claim([str(tmp_path)], "run")
    assert second != first
    assert second.name.startswith("sparkdeep-run-")
    assert claim([str(tmp_path)], "run") == second
    assert sweep([str(tmp_path)]) == [first]


def test_the_owner_is_the_nearest_java_ancestor(tmp_path):
    # A process that calls itself java, as the executor's JVM does, starts Python workers through a daemon.
    script = tmp_path / "java"
    worker = f"{sys.executable} -c 'from sparkdeep.data.scratch import *; print(owner_of_this_process().pid)'"
    script.write_text(f'#!/bin/bash\necho $$\nbash -c "{worker}; true"\n{worker}\ntrue\n')
    script.chmod(0o700)
    done = subprocess.run([str(script)], capture_output=True, text=True, timeout=60, check=True)
    pids = done.stdout.split()
    assert len(pids) == 3
    assert len(set(pids)) == 1


def test_without_a_java_ancestor_the_process_owns_itself(monkeypatch):
    real = owner_module._stat

    def renamed(pid):
        found = real(pid)
        return None if found is None else dataclasses.replace(found, command="other")

    monkeypatch.setattr(owner_module, "_stat", renamed)
    assert owner_of_this_process().pid == os.getpid()


def test_where_proc_is_missing_nothing_is_known_and_nothing_swept(tmp_path, monkeypatch):
    dead = claim_in_process_that_ends(tmp_path)
    monkeypatch.setattr(owner_module, "_PROC", tmp_path / "no-proc")
    unknown = owner_of_this_process()
    assert (unknown.pid, unknown.start, unknown.boot_id, unknown.pid_namespace) == (None, None, None, None)
    mine = claim([str(tmp_path)], "mine")
    assert claim([str(tmp_path)], "mine") == mine
    assert sweep([str(tmp_path)]) == []
    monkeypatch.undo()
    assert sweep([str(tmp_path)]) == [dead]


def test_the_run_id_must_be_a_name(tmp_path):
    for run_id in ("", "../x", "a/b", "a b", "x" * 101):
        with pytest.raises(ConfigError, match=r"run id .* are needed; rename the run"):
            claim([str(tmp_path)], run_id)


def test_directories_that_do_not_exist_are_refused():
    with pytest.raises(
        ConfigError, match=r"none of the local directories \['/nowhere/at/all'\] exists.*spark.local.dir"
    ):
        claim(["/nowhere/at/all"], "run")


def test_a_dead_processs_folder_is_swept_and_a_live_ones_kept(tmp_path):
    dead = claim_in_process_that_ends(tmp_path, "dead")
    (dead / "shard-0").mkdir()
    (dead / "shard-0" / "train.x.bin").write_bytes(b"rows")
    live = claim([str(tmp_path)], "live")
    command = [sys.executable, "-c", CLAIM + "; import time; time.sleep(60)", str(tmp_path), "other"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        other = Path(process.stdout.readline().strip())
        assert sweep([str(tmp_path)]) == [dead]
        assert live.is_dir()
        assert other.is_dir()
        assert not dead.exists()
        process.kill()
        deadline = time.monotonic() + 10
        while owner_module._stat(process.pid).state != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        # Killed and not yet reaped: its number is still taken, but it will never write again.
        assert sweep([str(tmp_path)]) == [other]


def test_a_number_given_to_another_process_does_not_keep_the_folder(tmp_path):
    path = claim([str(tmp_path)], "run")
    change_owner(path, start=1)
    assert sweep([str(tmp_path)]) == [path]


@pytest.mark.parametrize(
    ("changes", "dead"),
    [
        ({}, True),
        ({"boot_id": "before"}, True),
        ({"boot_id": "before", "hostname": "elsewhere"}, False),
        ({"hostname": "renamed"}, True),
        ({"pid_namespace": "pid:[1]"}, False),
        ({"pid_namespace": None}, False),
        ({"boot_id": None}, False),
        ({"pid": None, "start": None}, False),
        ({"uid": 12345}, False),
    ],
)
def test_only_what_is_provably_dead_is_swept(tmp_path, changes, dead):
    path = claim_in_process_that_ends(tmp_path)
    change_owner(path, **changes)
    assert sweep([str(tmp_path)]) == ([path] if dead else [])
    assert path.exists() is not dead


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"pid": 1}', '{"pid": "1", "start": 0}', None], ids=lambda text: repr(text)
)
def test_folders_that_do_not_say_whose_they_are_stay(tmp_path, content):
    path = claim_in_process_that_ends(tmp_path)
    if content is None:
        (path / "owner.json").unlink()
    else:
        (path / "owner.json").write_text(content)
    assert sweep([str(tmp_path)]) == []
    assert path.is_dir()


def test_symbolic_links_are_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    target = claim_in_process_that_ends(elsewhere / "deep" / "down" / "here" / "far")
    root = tmp_path / "root"
    root.mkdir()
    (root / "sparkdeep-link").symlink_to(target)
    (root / "blockmgr-link").symlink_to(target.parent)
    linked_owner = root / "sparkdeep-linked-owner"
    linked_owner.mkdir()
    (linked_owner / "owner.json").symlink_to(target / "owner.json")
    assert sweep([str(root)]) == []
    assert target.is_dir()
    assert linked_owner.is_dir()
    # A link inside a dead folder goes, what it points to stays.
    (target / "out").symlink_to(elsewhere)
    (elsewhere / "precious").write_text("kept")
    assert sweep([str(target.parent)]) == [target]
    assert (elsewhere / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    ("mine", "left"),
    [
        ("root/blockmgr-a", "root/blockmgr-b"),
        ("root/blockmgr-a", "root/spark-x/executor-y/blockmgr-z"),
        ("root/spark-p/executor-q/blockmgr-r", "root/spark-x/executor-y/blockmgr-z"),
        ("root/spark-p/executor-q/blockmgr-r", "root/blockmgr-b"),
        ("root/app-1/blockmgr-r", "root/app-2/blockmgr-b"),
        ("root/blockmgr-a", "root"),
        ("root/blockmgr-a", "root/blockmgr-a"),
    ],
)
def test_every_place_where_spark_keeps_an_executors_files_is_looked_at(tmp_path, mine, left):
    (tmp_path / mine).mkdir(parents=True)
    dead = claim_in_process_that_ends(tmp_path / left)
    assert sweep([str(tmp_path / mine)]) == [dead]


def test_the_search_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "root" / "blockmgr-mine").mkdir(parents=True)
    near = claim_in_process_that_ends(tmp_path / "root", "near")
    for i in range(50):
        (tmp_path / "root" / f"blockmgr-{i}").mkdir()
    looked = []
    real = scratch._children
    monkeypatch.setattr(scratch, "_children", lambda *args: looked.append(args) or real(*args))
    monkeypatch.setattr(scratch, "_MAX_FOLDERS", 20)
    assert sweep([str(tmp_path / "root" / "blockmgr-mine")]) == [near]
    assert len(looked) < 60


def test_two_sweepers_at_once_remove_everything_and_neither_fails(tmp_path):
    for i in range(40):
        path = claim([str(tmp_path)], f"run-{i}")
        change_owner(path, start=1)
        for j in range(5):
            (path / f"shard-{j}").mkdir()
    start, errors = threading.Barrier(4), []

    def work():
        try:
            start.wait(timeout=10)
            sweep([str(tmp_path)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert errors == []
    sweep([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_removing_leaves_a_folder_that_can_still_be_judged(tmp_path, monkeypatch):
    path = claim([str(tmp_path)], "run")
    change_owner(path, start=1)
    for name in ("a", "z"):
        (path / name).mkdir()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(scratch.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep([str(tmp_path)])
    monkeypatch.undo()
    assert (path / "owner.json").is_file()
    assert sweep([str(tmp_path)]) == [path]


def test_release_removes_the_folder_and_may_be_repeated(tmp_path):
    path = claim([str(tmp_path)], "run")
    (path / "shard").mkdir()
    (path / "shard" / "x.bin").write_bytes(b"1")
    release(path)
    assert not path.exists()
    release(path)
    with pytest.raises(AssertionError, match="not a folder made by claim"):
        release(tmp_path)


def test_the_owner_of_now_is_alive_and_named():
    me = owner_of_this_process()
    assert not is_dead(me)
    assert (me.hostname, me.uid) == (socket.gethostname(), os.geteuid())
