"""An executor dies in the middle of a round, on one of two hosts."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from cluster_models import HOSTS, Handshake, estimator, same_bits, weights

pytestmark = pytest.mark.cluster


def fit_with_kill(cluster, frame, folder, **options):
    """Fit, and kill the executor on 127.0.0.2 when its replica is in the middle of a round; returns (model, killed)."""
    killed = []

    def killer():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (Path(folder) / "reached-1").exists():
                killed.append(cluster.kill_executor(HOSTS[0], delete_folders=True))
                (Path(folder) / "killed").touch()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=killer)
    thread.start()
    # 8 batches a round: batch 36 is in the middle of the fifth round.
    model = estimator(preprocess=Handshake(folder, 36), **options).fit(frame)
    thread.join()
    return model, killed


@pytest.mark.fault(rows=[6], phases="TR")
def test_a_killed_executor_costs_one_round_and_not_a_bit_with_durable_state(cluster, frame, undisturbed, tmp_path):
    model, killed = fit_with_kill(cluster, frame, tmp_path, replica_state="durable", checkpoint_every=2)
    assert len(killed) == 1
    assert sum(record.retries for record in model.history) >= 1
    assert [record.round for record in model.history] == [record.round for record in undisturbed.history]
    assert same_bits(weights(model), weights(undisturbed))


def test_replicas_run_on_two_hosts_and_leave_nothing_on_either(cluster, frame, cluster_session):
    left_behind = [path for host in HOSTS for path in cluster.local_dir(host).rglob("sparkdeep-*")]
    assert left_behind == []

    def local_dirs(batches):
        import pyarrow as pa

        list(batches)
        yield pa.RecordBatch.from_pydict({"folder": [os.environ["SPARK_LOCAL_DIRS"]]})

    folders = [
        row.folder
        for row in cluster_session.range(0, 2, 1, 2).mapInArrow(local_dirs, "folder string", barrier=True).collect()
    ]
    assert {host for host in HOSTS for folder in folders if f"local-{host}" in folder} == set(HOSTS)


def test_with_local_state_the_loss_is_named(cluster, frame, tmp_path):
    model, killed = fit_with_kill(cluster, frame, tmp_path, replica_state="local")
    assert len(killed) == 1
    reset = [record.state_reset for record in model.history if record.state_reset]
    assert len(reset) == 1
    assert len(reset[0]) == 1
    assert model.history[-1].round == len(model.history)
