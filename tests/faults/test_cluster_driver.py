"""The driver's process is killed or interrupted; the same call again goes on where it was."""

from __future__ import annotations

import signal

import pytest
from child_drivers import ChildDriver
from fault_models import Signal, estimator
from fault_runs import verified_rounds

from sparkdeep.testing.injection import Injector

pytestmark = pytest.mark.cluster


def killed(fault_cluster, folder, injector, checkpoints, master=""):
    """Run a driver that its injector kills; returns the rounds it reported."""
    with ChildDriver(fault_cluster, folder, injector, master=master, checkpoint_dir=str(checkpoints)) as child:
        assert child.wait() == -signal.SIGKILL, child.log()
        injector.check_fired()
        child.check_gone()
        return [int(number) for number in child.rounds()]


def gone_on(fault_frame, reference, tmp_path, checkpoints):
    """The same call again, in this process's session; returns the rounds that it trained."""
    trained = []
    nothing = Injector(tmp_path / "nothing")
    options = {"checkpoint_dir": str(checkpoints), "callbacks": [lambda record: trained.append(record.round) or False]}
    model = estimator(nothing, **options).fit(fault_frame)
    reference.check(model)
    assert verified_rounds(checkpoints)[-1] == len(reference.rows)
    return trained


@pytest.mark.fault(rows=[13], phases="TR CM")
def test_a_driver_killed_in_a_round_and_again_between_files_and_commit_loses_one_round_at_most(
    fault_cluster, fault_frame, reference, leaks, tmp_path
):
    checkpoints = tmp_path / "checkpoints"
    first, second = tmp_path / "first", tmp_path / "second"
    driver = Signal(first / "pid", signal.SIGKILL)
    injector = Injector(tmp_path / "plan-1").call_at("step", 4, 0, action=driver)
    assert killed(fault_cluster, first, injector, checkpoints) == [1, 2, 3]
    assert verified_rounds(checkpoints)[-1] == 3
    injector = Injector(tmp_path / "plan-2").kill_at("commit", 6)
    # Of two hosts or of one, it is the same run; on local[2] it is a quicker test.
    assert killed(fault_cluster, second, injector, checkpoints, "local[2]") == [4, 5]
    assert verified_rounds(checkpoints)[-1] == 5
    assert gone_on(fault_frame, reference, tmp_path, checkpoints) == [6, 7, 8]
    leaks.check()


IN_DRIVER = {"preflight": 0, "slots": 0, "average": 3, "checkpoint": 3, "between": 4}
IN_REPLICA = {"load": 0, "train": 3, "transfer": 3}


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[13], phases="PF SL LD TR RT AV CK BT")
@pytest.mark.parametrize("phase", [*IN_DRIVER, *IN_REPLICA])
def test_a_driver_killed_in_any_phase_goes_on(fault_cluster, fault_frame, reference, leaks, tmp_path, phase):
    checkpoints, child = tmp_path / "checkpoints", tmp_path / "child"
    kept = {**IN_DRIVER, **IN_REPLICA}[phase]
    injector = Injector(tmp_path / "plan")
    round_number = None if kept == 0 else 4
    if phase in IN_DRIVER:
        injector.kill_at(phase, round_number)
    else:
        injector.call_at(phase, round_number, 1, action=Signal(child / "pid", signal.SIGKILL))
    killed(fault_cluster, child, injector, checkpoints)
    committed = verified_rounds(checkpoints) if (checkpoints / "commits").exists() else []
    assert committed[-1:] in ([[kept]] if kept else [[], [0]])
    assert gone_on(fault_frame, reference, tmp_path, checkpoints) == list(range(kept + 1, len(reference.rows) + 1))
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[13], phases="RS")
def test_a_driver_killed_while_it_resumes_goes_on(fault_cluster, fault_frame, reference, leaks, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    injector = Injector(tmp_path / "plan-1").kill_at("between", 3)
    assert killed(fault_cluster, tmp_path / "first", injector, checkpoints) == [1, 2, 3]
    injector = Injector(tmp_path / "plan-2").kill_at("resume")
    assert killed(fault_cluster, tmp_path / "second", injector, checkpoints) == []
    assert gone_on(fault_frame, reference, tmp_path, checkpoints) == [4, 5, 6, 7, 8]
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[14], phases="SL TR RT CK")
def test_ctrl_c_in_any_phase_is_a_keyboard_interrupt_that_leaves_nothing(fault_cluster, tmp_path):
    phases = ["slots", "waiting", "step", "transfer", "checkpoint"]
    with ChildDriver(fault_cluster, tmp_path / "child", interrupts=phases) as child:
        assert child.wait(280) == 0, child.log()
        assert child.rounds() == [f"{phase} interrupted" for phase in phases]
        child.check_gone()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[39], phases="BT")
def test_a_session_that_is_stopped_in_between_is_named_and_the_run_goes_on_in_another(
    fault_cluster, fault_frame, reference, leaks, tmp_path
):
    checkpoints = tmp_path / "checkpoints"
    with ChildDriver(fault_cluster, tmp_path / "child", stop_at=3, checkpoint_dir=str(checkpoints)) as child:
        assert child.wait() == 0, child.log()
        kind, message = child.error()
        assert kind == "SparkdeepError"
        assert "stopped" in message
        child.check_gone()
    assert gone_on(fault_frame, reference, tmp_path, checkpoints) == [4, 5, 6, 7, 8]
    leaks.check()
