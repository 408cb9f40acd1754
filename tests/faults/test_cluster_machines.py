"""A whole machine goes: the worker daemon and its executor; another one comes, or none. A cluster without spare cores."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from child_drivers import ChildDriver
from cluster_fixtures import HOSTS, Cluster, wait_for
from fault_runs import verified_rounds

pytestmark = [pytest.mark.cluster, pytest.mark.slow_fault]


@pytest.fixture(scope="module")
def tight_cluster(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("tight"))
    yield running
    running.stop()


@pytest.fixture
def two_hosts(tight_cluster):
    """The cluster with both its workers, whatever the test before did to it."""
    for host in HOSTS:
        if tight_cluster.processes[host].poll() is not None:
            tight_cluster.start_worker(host)
    wait_for(lambda: tight_cluster.workers() == len(HOSTS), 60, "both workers")
    return tight_cluster


def machine_lost(cluster, child):
    cluster.kill_machine(HOSTS[0], (child.folder / "session").read_text())


def same_bits(weights, reference):
    return all(torch.equal(value, reference.weights[name]) for name, value in weights.items())


@pytest.mark.fault(rows=[7], phases="TR")
def test_a_machine_that_is_not_replaced_ends_the_fit_in_time_with_a_checkpoint_to_go_on_from(
    two_hosts, reference, tmp_path
):
    checkpoints = tmp_path / "checkpoints"
    options = {"checkpoint_dir": str(checkpoints), "open_timeout_s": 12.0, "max_retries": 1}
    with ChildDriver(two_hosts, tmp_path / "lost", rounds_per_stage=1, **options) as child:
        child.wait_for_round(3)
        machine_lost(two_hosts, child)
        began = time.monotonic()
        assert child.wait(120) == 0, child.log()
        # Two attempts of 12 s each, the back-off, and the clean-up's and the session's ends.
        assert time.monotonic() - began < 75
        kind, message = child.error()
        assert kind == "ReplicaLostError"
        assert "slots" in message
        assert "open_timeout_s=12" in message
        child.check_gone()
    committed = verified_rounds(checkpoints)[-1]
    assert committed >= 3
    two_hosts.start_worker(HOSTS[0])
    wait_for(lambda: two_hosts.workers() == len(HOSTS), 60, "the machine to come back")
    with ChildDriver(two_hosts, tmp_path / "again", rounds_per_stage=1, **options) as child:
        assert child.wait() == 0, child.log()
        assert [int(number) for number in child.rounds()] == list(range(committed + 1, len(reference.rows) + 1))
        assert same_bits(child.weights(), reference)
        child.check_gone()


@pytest.mark.fault(rows=[8], phases="SL")
def test_a_machine_that_is_replaced_ten_seconds_later_is_waited_for(two_hosts, reference, tmp_path):
    with ChildDriver(two_hosts, tmp_path / "child", checkpoint_dir=str(tmp_path / "checkpoints")) as child:
        child.wait_for_round(3)
        machine_lost(two_hosts, child)
        later = threading.Timer(10.0, two_hosts.start_worker, args=(HOSTS[0],))
        later.start()
        assert child.wait() == 0, child.log()
        later.join()
        assert [int(number) for number in child.rounds()] == list(range(1, len(reference.rows) + 1))
        assert same_bits(child.weights(), reference)
        child.check_gone()


@pytest.mark.fault(rows=[7, 8], phases="TR")
def test_a_worker_daemon_that_is_killed_takes_its_executor_along_and_the_fit_goes_on_with_the_next(
    two_hosts, reference, tmp_path
):
    with ChildDriver(two_hosts, tmp_path / "child") as child:
        child.wait_for_round(3)
        two_hosts.kill_worker(HOSTS[1])
        two_hosts.start_worker(HOSTS[1])
        assert child.wait() == 0, child.log()
        assert [int(number) for number in child.rounds()] == list(range(1, len(reference.rows) + 1))
        assert same_bits(child.weights(), reference)
        child.check_gone()


@pytest.mark.parametrize("shared", [False, True], ids=["ingested anew", "dealt anew"])
@pytest.mark.fault(rows=[7, 8], phases="TR,BT")
def test_a_run_goes_on_with_fewer_replicas_and_with_all_again_when_the_machine_is_back(two_hosts, tmp_path, shared):
    options = {"min_workers": 1, "replacement_timeout_s": 3.0, "rounds_per_stage": 1, "epochs": 8}
    if shared:
        options["shard_dir"] = str(tmp_path / "shards")
    with ChildDriver(two_hosts, tmp_path / "child", **options) as child:
        child.wait_for_round(3)
        machine_lost(two_hosts, child)
        wait_for(lambda: child.changes() or child.process.poll() is not None, 90, "fewer replicas")
        assert child.changes()[0].endswith(": 2 -> 1"), child.log()
        two_hosts.start_worker(HOSTS[0])
        assert child.wait() == 0, child.log()
        assert [change.partition(": ")[2] for change in child.changes()] == ["2 -> 1", "1 -> 2"], child.log()
        numbers = [int(number) for number in child.rounds()]
        assert numbers == list(range(1, numbers[-1] + 1))
        child.weights()
        child.check_gone()
