"""Workers and executors of two hosts are killed, crash, stop and come back as zombies in the middle of a fit."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
from cluster_fixtures import HOSTS, kill_executor
from fault_models import KillParent, Linger, LoseExecutor, SlowHost, Stop, estimator, segfault

from sparkdeep.testing.injection import Injector

pytestmark = pytest.mark.cluster


def gone_within(pid, seconds):
    assert pid > 1
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} outlived its fit by {seconds} s"
        time.sleep(0.1)


@pytest.mark.fault(rows=[3], phases="LD TR RT")
def test_a_worker_killed_while_it_loads_trains_and_sends_costs_a_retry_each_and_not_a_bit(
    fault_frame, reference, leaks, tmp_path, caplog
):
    injector = Injector(tmp_path / "plan").kill_at("load", 1, 0).kill_at("train", 4, 1).kill_at("transfer", 6, 0)
    with injector.installed():
        model = estimator(injector).fit(fault_frame)
    injector.check_fired()
    reference.check(model, retries=3)
    assert [record.round for record in model.history if record.retries] == [1, 4, 6]
    assert caplog.text.count("exited unexpectedly") == 3  # the cause, and what to raise if it was memory
    assert caplog.text.count("spark.executor.memoryOverhead") == 3
    leaks.check()


@pytest.mark.fault(rows=[4], phases="TR")
def test_a_worker_that_crashes_in_native_code_costs_one_retry_and_not_a_bit(
    fault_frame, reference, leaks, tmp_path, caplog
):
    injector = Injector(tmp_path / "plan").call_at("step", 4, 1, action=segfault)
    with injector.installed():
        model = estimator(injector).fit(fault_frame)
    injector.check_fired()
    reference.check(model, retries=1)
    assert "exited unexpectedly" in caplog.text
    leaks.check()


@pytest.mark.fault(rows=[6], phases="TR BT")
def test_an_executor_that_goes_with_its_disk_in_and_between_rounds_costs_no_bit(
    fault_cluster, fault_session, fault_frame, reference, leaks, tmp_path
):
    application = fault_session.sparkContext.applicationId
    between = partial(kill_executor, str(fault_cluster.root), HOSTS[0], True, application)
    injector = Injector(tmp_path / "plan").call_at("step", 3, 1, action=LoseExecutor())
    injector.call_at("between", 5, action=between)
    with injector.installed():
        model = estimator(injector).fit(fault_frame)
    injector.check_fired()
    reference.check(model)
    # The driver may have heard of all of round 6 before the executor is gone.
    assert [record.round for record in model.history if record.retries] in ([3, 6], [3, 7])
    leaks.check()
    assert leaks.of_the_dead() == []


@pytest.mark.fault(rows=[10], phases="TR")
def test_a_stopped_worker_is_given_up_at_the_deadline_and_is_gone_soon_after(
    fault_frame, reference, leaks, tmp_path, caplog
):
    injector = Injector(tmp_path / "plan").call_at("step", 4, 1, action=Stop(tmp_path, "stopped"))
    with injector.installed():
        model = estimator(injector, stall_timeout_s=12.0).fit(fault_frame)
    injector.check_fired()
    gone_within(int((tmp_path / "stopped").read_text()), 20)
    reference.check(model, retries=1)
    assert "sent nothing for 12 s" in caplog.text
    assert "replica 1 on 127.0.0." in caplog.text
    leaks.check()


@pytest.mark.fault(rows=[18], phases="TR RT")
def test_a_zombie_that_wakes_during_the_next_attempt_changes_nothing(fault_frame, reference, leaks, tmp_path):
    # It wakes 1 to 1.5 s after it was given up: Spark kills a cancelled task's worker after 2 s (spark.python.task.killTimeout).
    injector = Injector(tmp_path / "plan")
    injector.call_at("step", 3, 0, action=Linger(tmp_path, "trains", 5.5))
    injector.call_at("transfer", 5, 1, action=Linger(tmp_path, "sends", 5.0))
    with injector.installed():
        model = estimator(injector, stall_timeout_s=4.0, retry_backoff_s=0.1).fit(fault_frame)
    injector.check_fired()
    assert (tmp_path / "trains").exists()
    assert (tmp_path / "sends").exists()
    reference.check(model, retries=2)
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[9], phases="TR")
def test_the_daemon_that_forks_workers_is_killed(fault_frame, reference, leaks, tmp_path):
    injector = Injector(tmp_path / "plan").call_at("step", 4, 1, action=KillParent(tmp_path, "orphan"))
    with injector.installed():
        model = estimator(injector, rounds_per_stage=2).fit(fault_frame)
    injector.check_fired()
    reference.check(model)
    gone_within(int((tmp_path / "orphan").read_text()), 10)
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[11], phases="TR")
def test_a_straggler_is_waited_for_and_its_host_told(fault_frame, leaks):
    model = estimator(preprocess=SlowHost(HOSTS[0], 0.3), stall_timeout_s=10.0).fit(fault_frame)
    assert sum(record.retries for record in model.history) == 0
    # The same replica all along, by its four batches of 0.3 s; Spark tells one address for both hosts of this machine.
    slowest = {record.slowest for record in model.history}
    assert len(slowest) == 1
    for record in model.history:
        part = record.replicas[record.slowest]
        assert part.compute_seconds == record.compute_seconds > 1.2
        assert part.host.startswith("127.0.0.")
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[6], phases="TR")
def test_both_executors_are_lost_at_once(fault_frame, reference, leaks, tmp_path):
    injector = Injector(tmp_path / "plan")
    for replica in (0, 1):
        injector.call_at("step", 4, replica, action=LoseExecutor())
    with injector.installed():
        model = estimator(injector).fit(fault_frame)
    injector.check_fired()
    reference.check(model)
    assert [record.round for record in model.history if record.retries] == [4]
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[6], phases="LD RT")
def test_an_executor_lost_while_it_loads_and_while_it_sends_costs_no_bit(fault_frame, reference, leaks, tmp_path):
    injector = Injector(tmp_path / "plan")
    injector.call_at("load", 1, 1, action=LoseExecutor()).call_at("transfer", 5, 0, action=LoseExecutor())
    with injector.installed():
        model = estimator(injector).fit(fault_frame)
    injector.check_fired()
    reference.check(model)
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[6], phases="BT")
def test_what_a_killed_executor_left_lies_under_the_runs_id_and_the_next_fit_sweeps_it(
    fault_cluster, fault_session, fault_frame, reference, leaks, tmp_path
):
    application = fault_session.sparkContext.applicationId
    injector = Injector(tmp_path / "plan")
    last = len(reference.rows)
    # After the last round nothing runs on that host any more but the clean-up, which the dead one cannot do.
    killed = partial(kill_executor, str(fault_cluster.root), HOSTS[0], False, application)
    injector.call_at("between", last, action=killed)
    with injector.installed():
        reference.check(estimator(injector).fit(fault_frame))
    injector.check_fired()
    leaks.check()
    dead = leaks.of_the_dead()
    assert dead
    assert all(Path(path).parent.is_relative_to(fault_cluster.local_dir(HOSTS[0])) for path in dead)
    reference.check(estimator().fit(fault_frame))
    leaks.check()
    assert leaks.of_the_dead() == []
