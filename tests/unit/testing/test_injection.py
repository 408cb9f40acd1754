from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD
from twin import deal, flat, run, schema_of
from twin_faults import marked_table

from sparkdeep import seams
from sparkdeep.errors import ReplicaLostError
from sparkdeep.models.program import Program
from sparkdeep.testing.injection import Injector


def fitted(tmp_path, **options):
    torch.manual_seed(0)
    x, y = marked_table([12, 12])
    program = Program(model=nn.Linear(4, 1), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.01))
    settings = {"epochs": 2, "batch_size": 4, "sync_every": 1, **options}
    _, records, _ = run(tmp_path, program, deal(x, y, [12, 12]), schema_of(x, y), **settings)
    return flat(program.model), records


@pytest.mark.parametrize("phase", ["slots", "load", "train", "step", "transfer", "average", "checkpoint"])
def test_a_fault_in_any_phase_strikes_once_and_costs_not_a_bit(tmp_path, phase):
    undisturbed, _ = fitted(tmp_path)
    durable = {"replica_state": "durable", "checkpoint_every": 1} if phase == "checkpoint" else {}
    replica = 1 if phase in {"load", "train", "step", "transfer"} else None
    injector = Injector(tmp_path / "plan").fail_at(phase, 4 if phase not in {"slots", "load"} else None, replica)
    with injector.installed():
        trained, records = fitted(tmp_path, rounds_per_stage=2, **durable)
    injector.check_fired()
    assert any(record.retries == 1 for record in records)
    assert torch.equal(trained, undisturbed)


@pytest.mark.fault(rows=[21], phases="RT")
def test_corrupted_bytes_void_the_round_and_are_sent_again(tmp_path):
    undisturbed, _ = fitted(tmp_path)
    injector = Injector(tmp_path / "plan").corrupt_at("transfer", 3, 0).delay_at("train", 2, 1, seconds=0.01)
    with injector.installed():
        trained, records = fitted(tmp_path)
    injector.check_fired()
    assert [record.retries for record in records] == [0, 0, 1, 0, 0, 0]
    assert torch.equal(trained, undisturbed)


def test_what_never_happened_is_named(tmp_path):
    injector = Injector(tmp_path / "plan").fail_at("train", 99)
    with injector.installed():
        fitted(tmp_path)
    with pytest.raises(AssertionError, match="round=99"):
        injector.check_fired()


def test_two_faults_of_one_place_strike_in_order_one_after_the_other(tmp_path):
    heard = []
    injector = Injector(tmp_path / "plan")
    injector.call_at("between", 1, action=lambda: heard.append("first")).call_at(
        "between", 1, action=lambda: heard.append("second")
    )
    with injector.installed():
        for _ in range(3):
            seams.reach("between", round_number=1)
    assert heard == ["first", "second"]


def test_it_travels_into_another_process_and_strikes_there(tmp_path):
    injector = (
        Injector(tmp_path / "plan").kill_at("transform", signum=9).fail_at("load", error=ReplicaLostError("far away"))
    )
    script = (
        "import pickle, sys; from sparkdeep import seams\n"
        f"carrier = pickle.loads({pickle.dumps(injector.carrier())!r})\n"
        "assert carrier('x') == 'x'\n"
        "try: seams.reach('load')\n"
        "except Exception as error: print(type(error).__name__, error, flush=True)\n"
        "seams.reach('transform')\nprint('alive')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "ReplicaLostError far away\n"
    assert ended.returncode == -9
    injector.check_fired()
    assert seams.installed() is None
