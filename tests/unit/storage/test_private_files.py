"""Every file of ours is for the user alone, whatever the umask: 0600 in folders of 0700."""

from __future__ import annotations

import os
import stat
from functools import partial

import pytest
import torch
from torch import nn
from twin import deal, local_coordinator, make_fit, schema_of
from twin_faults import marked_table

from sparkdeep.data.scratch import claim, release
from sparkdeep.models.program import Program
from sparkdeep.models.registry import ModelReference
from sparkdeep.models.saving import write_model
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.opening import open_store
from sparkdeep.storage.store import run_folder


@pytest.fixture(autouse=True)
def _nothing_is_masked():
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(root):
    """The files below `root` that are not their owner's alone, or lie in a folder that is not; and how many there are."""
    files = [path for path in root.rglob("*") if not path.is_dir()]
    shown = {path.relative_to(root).as_posix(): (mode_of(path), mode_of(path.parent)) for path in files}
    return {name: modes for name, modes in shown.items() if modes != ("600", "700")}, len(files)


def mode_of(path):
    return f"{stat.S_IMODE(path.lstat().st_mode):o}"


def test_the_look_sees_an_open_file_and_an_open_folder(tmp_path):
    for folder, folder_mode, mode in [("a", 0o700, 0o666), ("b", 0o777, 0o600), ("c", 0o700, 0o600)]:
        (tmp_path / folder).mkdir(mode=folder_mode)
        os.close(os.open(tmp_path / folder / "f", os.O_CREAT | os.O_WRONLY, mode))
    assert open_to_others(tmp_path) == ({"a/f": ("666", "700"), "b/f": ("600", "777")}, 3)


def test_shards_states_and_checkpoints_of_a_run_are_private(tmp_path):
    x, y = marked_table([22, 14])
    program = Program(model=nn.Linear(4, 1), loss=nn.MSELoss(), optimizer=partial(torch.optim.AdamW, lr=0.01))
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    port = local_coordinator(tls=True)
    seen = []
    try:
        fit = make_fit(
            home, program, deal(x, y, [22, 14]), schema_of(x, y), coordinator=port, epochs=2, batch_size=4, sync_every=2,
            checkpoints=CheckpointDirectory(LocalStore(home / "checkpoints"), identity={}), checkpoint_every=1,
        )  # fmt: skip
        seen.extend(open_to_others(home) for _ in fit.rounds())
    finally:
        port.close()
    names = {path.name.partition(".")[0] for path in home.rglob("*")}
    assert {"shard", "checkpoints", "round-000000006"} <= names  # shards, commits and states were among it
    assert [found for found, _ in seen] == [{}] * 6
    assert seen[-1][1] > 20


def test_a_claimed_folder_a_model_and_an_exchange_are_private(tmp_path):
    claimed = claim([str(tmp_path)], "run")
    store = open_store(str(tmp_path / "exchange"))
    store.write(f"{run_folder('run')}/update", b"x")
    write_model(
        LocalStore(tmp_path / "model"), nn.Linear(1, 1), reference=ModelReference(name="torch.nn:Linear"), meta={},
        pickled=b"p",
    )  # fmt: skip
    found, count = open_to_others(tmp_path)
    assert found == {}
    assert count == 5
    release(claimed)
