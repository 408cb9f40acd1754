"""Rows of the fault matrix on the in-process twin: threads for replicas, the real wire, the real files."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from invariants import SIZES, Outcome, X, Y, assert_invariants, last_word, program, tensors_of, threads, train
from paths import ROOT, SUPPORT
from torch import nn
from torch.optim import SGD
from twin import deal, run, schema_of
from twin_faults import Plan

from sparkdeep.errors import ConfigError, ReplicaLostError, UserCodeError
from sparkdeep.models.program import Program
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.testing.injection import Injector


def checkpoints(folder):
    return CheckpointDirectory(LocalStore(folder / "checkpoints"), identity={"run": "x"}, keep=3)


def kept(folder):
    return {"checkpoints": checkpoints(folder), "checkpoint_every": 1, "replica_state": "durable"}


def injector_of(folder):
    return Injector(folder / "plan")


# -- the user's code ---------------------------------------------------------------------------------------------------


@pytest.mark.fault(rows=[1, 2], phases="TR")
@pytest.mark.parametrize(("round_number", "replica"), [(1, 0), (4, 1), (6, 0)])
def test_a_late_exception_of_one_replica_ends_the_fit_and_leaves_a_checkpoint_to_go_on_from(
    tmp_path, undisturbed, round_number, replica
):
    injector = injector_of(tmp_path).fail_at("step", round_number, replica, error=KeyError("no such color"))
    plan = Plan()
    with injector.installed(), pytest.raises(UserCodeError, match=r"(?s)^Traceback.*no such color") as caught:
        train(tmp_path, plan=plan, injector=injector, **kept(tmp_path))
    assert caught.value.replica == replica
    assert caught.value.host
    assert plan.launches == 1
    latest = checkpoints(tmp_path).latest()
    assert latest.round_number == round_number - 1
    got = train(tmp_path, **kept(tmp_path))
    assert_invariants(got, undisturbed, first_round=round_number)


# -- replicas that are lost ----------------------------------------------------------------------------------------------


@pytest.mark.fault(rows=[3], phases="LD,TR,RT")
@pytest.mark.parametrize("phase", ["load", "train", "step", "transfer"])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_replica_that_is_lost_in_any_phase_costs_a_repetition_and_not_a_bit(tmp_path, undisturbed, phase, replica):
    injector = injector_of(tmp_path).fail_at(phase, None if phase == "load" else 3, replica)
    with injector.installed():
        got = train(tmp_path, injector=injector)
    assert_invariants(got, undisturbed)
    assert [r.round for r in got.records if r.retries] == [1 if phase == "load" else 3]


@pytest.mark.fault(rows=[5], phases="TR")
def test_a_replica_that_is_lost_again_and_again_is_given_up_by_name(tmp_path):
    injector = injector_of(tmp_path)
    for _ in range(4):
        injector.fail_at("train", 2, 1, error=ReplicaLostError("killed"))
    plan = Plan()
    with injector.installed(), pytest.raises(ReplicaLostError, match=r"replica 1 on .*killed") as caught:
        train(tmp_path, plan=plan, injector=injector, max_retries=3)
    assert caught.value.replica == 1
    assert plan.launches == 4
    assert plan.fit.state.committed == 1


@pytest.mark.fault(rows=[10, 18], phases="TR,RT")
@pytest.mark.parametrize("phase", ["train", "transfer"])
def test_a_replica_that_wakes_up_after_its_round_was_begun_again_counts_nowhere(tmp_path, undisturbed, phase):
    plan, woke = Plan(), []

    def sleep():
        begun_again = plan.until_relaunched()
        time.sleep(0.1)
        woke.append(begun_again)

    injector = injector_of(tmp_path).call_at(phase, 3, 0, action=sleep)
    with injector.installed():
        got = train(tmp_path, plan=plan, injector=injector, stall_timeout_s=0.4)
    assert_invariants(got, undisturbed)
    assert woke == [True], "it woke up while another attempt was under way"
    assert last_word(got.records)[2].retries >= 1


@pytest.mark.fault(rows=[12], phases="RT")
@pytest.mark.parametrize("how", ["cut", "slow"])
def test_a_line_that_is_cut_or_silent_while_an_update_travels_voids_the_round(tmp_path, undisturbed, how):
    plan, injector = Plan(), injector_of(tmp_path)
    if how == "cut":
        injector.call_at("transfer", 4, 1, action=lambda: plan.hang_up(1)(None))
    else:
        injector.call_at("transfer", 4, 1, action=plan.until_relaunched)
    with injector.installed():
        got = train(tmp_path, plan=plan, injector=injector, stall_timeout_s=0.5)
    assert_invariants(got, undisturbed)
    assert last_word(got.records)[3].retries >= 1


@pytest.mark.fault(rows=[21], phases="RT")
@pytest.mark.parametrize("round_number", [1, 3, 6])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_bit_that_flips_in_an_update_voids_the_round(tmp_path, undisturbed, round_number, replica):
    injector = injector_of(tmp_path).corrupt_at("transfer", round_number, replica)
    with injector.installed():
        got = train(tmp_path, injector=injector)
    assert_invariants(got, undisturbed)
    assert [r.round for r in got.records if r.retries] == [round_number]


# -- the driver ----------------------------------------------------------------------------------------------------------


class DriverGone(BaseException):
    """Stands for the end of the driver's process: nothing in it handles this."""


@pytest.mark.fault(rows=[13], phases="AV,CK,CM,BT")
@pytest.mark.parametrize("phase", ["slots", "average", "checkpoint", "commit", "between"])
def test_a_driver_that_ends_in_any_phase_loses_at_most_the_round_at_hand(tmp_path, undisturbed, phase):
    def end():
        raise DriverGone

    injector = injector_of(tmp_path).call_at(phase, 4, action=end)
    plan = Plan()
    with injector.installed(), pytest.raises(DriverGone):
        train(tmp_path, plan=plan, injector=injector, rounds_per_stage=1, **kept(tmp_path))
    committed = checkpoints(tmp_path).latest().round_number
    assert committed == (4 if phase == "between" else 3)
    assert_invariants(train(tmp_path, **kept(tmp_path)), undisturbed, first_round=committed + 1)


@pytest.mark.fault(rows=[14], phases="SL,TR,RT,CK")
@pytest.mark.parametrize("phase", ["slots", "train", "transfer", "average", "checkpoint"])
def test_ctrl_c_in_any_phase_is_a_keyboard_interrupt_and_leaves_nothing(tmp_path, undisturbed, phase):
    def interrupt():
        _thread.interrupt_main()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)  # the main thread hears of it while this one is at work

    injector = injector_of(tmp_path).call_at(phase, 3, 1 if phase in {"train", "transfer"} else None, action=interrupt)
    with injector.installed(), pytest.raises(KeyboardInterrupt):
        train(tmp_path, injector=injector, rounds_per_stage=1, **kept(tmp_path))
    committed = checkpoints(tmp_path).latest().round_number
    assert committed == 2
    assert_invariants(train(tmp_path, **kept(tmp_path)), undisturbed, first_round=3)


@pytest.mark.fault(rows=[16], phases="TR")
def test_two_fits_at_the_same_time_do_not_meet(tmp_path, undisturbed):
    outcomes = {}

    def fit(name):
        rows = deal(X, Y, SIZES)
        options = {"epochs": 2, "batch_size": 4, "sync_every": 2, "rounds_per_stage": 2}
        began = time.monotonic()
        module, records, own = run(tmp_path, program_of[name], rows, schema_of(X, Y), **options)
        outcomes[name] = Outcome(
            tensors_of(module), records, own.stages.coordinator.address, time.monotonic() - began, Plan()
        )

    program_of = {name: program() for name in ("first", "second")}
    workers = [threading.Thread(target=fit, args=(name,)) for name in program_of]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for name in program_of:
        assert_invariants(outcomes[name], undisturbed)
    assert threads() == []


# -- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(rows=[29], phases="TR")
def test_a_shard_of_a_hundred_times_the_rows_weighs_a_hundred_times_as_much(tmp_path):
    sizes = [400, 4]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64).numpy()
    y = torch.randn(sum(sizes), 1, generator=generator, dtype=torch.float64).numpy()

    def trained(parts):
        torch.manual_seed(1)
        own = Program(model=nn.Linear(3, 1).double(), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.05))
        options = {"epochs": 1, "batch_size": 8, "sync_every": "epoch"}
        module, records, _ = run(tmp_path, own, parts, schema_of(x, y), **options)
        return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), records

    together, (record,) = trained(deal(x, y, sizes))
    large, small = (trained([part])[0] for part in deal(x, y, sizes))
    torch.testing.assert_close(together, (400 * large + 4 * small) / 404, rtol=1e-14, atol=1e-15)
    assert (together - (large + small) / 2).abs().max() > 1e-4, "a plain mean would show"
    assert [part.rows for part in record.replicas] == sizes


@pytest.mark.fault(rows=[27], phases="PF")
def test_no_training_row_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no training rows are left"):
        run(tmp_path, program(), deal(X[:0], Y[:0], [0, 0]), schema_of(X, Y))


# -- surroundings --------------------------------------------------------------------------------------------------------

_HOSTILE = """
import os, sys, time
from pathlib import Path
folder = Path(os.fsdecode(bytes.fromhex(sys.argv[1])))
os.chdir("/proc")
from invariants import kept_bits
from sparkdeep.testing.injection import Injector
shift, real = [0.0], time.time
time.time = lambda: real() + shift[0]
injector = Injector(folder / "plan")
injector.call_at("train", 2, 0, action=lambda: shift.__setitem__(0, -86400.0 * 365))
injector.call_at("between", 4, action=lambda: shift.__setitem__(0, 86400.0 * 365))
with injector.installed():
    print(kept_bits(folder))
injector.check_fired()
"""


@pytest.mark.fault(rows=[42], phases="TR,CK")
def test_clock_locale_zone_and_odd_paths_have_no_effect(tmp_path, undisturbed):
    from invariants import digest_of

    folder = os.fsencode(tmp_path) + b"/a folder \xff\xfe 'quoted'\n"
    os.mkdir(folder)
    environment = {
        **os.environ,
        "LC_ALL": "tr_TR.ISO-8859-9",
        "LANG": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TZ": "Asia/Kathmandu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(SUPPORT), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _HOSTILE, folder.hex()], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest_of(undisturbed.tensors)
