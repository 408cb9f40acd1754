"""What happens to shards and workers between rounds: moved, deleted, stopped, left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from cluster_models import HOSTS, estimator, same_bits, weights

pytestmark = pytest.mark.cluster


@pytest.mark.fault(rows=[37], phases="BT")
def test_a_shard_that_is_gone_is_ingested_anew_to_the_same_bits(cluster, frame, undisturbed):
    deleted = []

    def delete_once(record):
        if record.round == 3 and not deleted:
            deleted.extend(cluster.local_dir(HOSTS[1]).rglob("sparkdeep-*/shard-*"))
            for path in deleted:
                shutil.rmtree(path)

    # A new generation may lie the other way round on the two hosts: durable states go along, local ones would not.
    settings = {"rounds_per_stage": 1, "replica_state": "durable", "checkpoint_every": 1}
    model = estimator(callbacks=[delete_once], **settings).fit(frame)
    assert deleted
    assert sum(record.retries for record in model.history) == 1
    assert same_bits(weights(model), weights(undisturbed))


class StopHere:
    """Stops its own process (SIGSTOP) in the middle of a round, once."""

    def __init__(self, marker, batches):
        self.marker = str(marker)
        self.batches = batches
        self.seen = 0

    def __call__(self, x):
        self.seen += 1
        if self.seen == self.batches:
            try:
                fd = os.open(self.marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return x
            os.write(fd, json.dumps({"pid": os.getpid()}).encode())
            os.close(fd)
            os.kill(os.getpid(), signal.SIGSTOP)
        return x


@pytest.mark.fault(rows=[10], phases="TR")
def test_a_stopped_worker_is_given_up_after_the_deadline_and_its_round_repeated(frame, undisturbed, tmp_path):
    began = time.monotonic()
    model = estimator(preprocess=StopHere(tmp_path / "stopped", 20), stall_timeout_s=5.0).fit(frame)
    stopped = json.loads((tmp_path / "stopped").read_text())["pid"]
    assert stopped > 1
    assert sum(record.retries for record in model.history) == 1
    assert same_bits(weights(model), weights(undisturbed))
    assert time.monotonic() - began < 120
    deadline = time.monotonic() + 10
    while Path(f"/proc/{stopped}").exists():
        assert time.monotonic() < deadline, "the stopped worker outlived the fit by ten seconds"
        time.sleep(0.2)


@pytest.mark.fault(rows=[6], phases="BT")
def test_what_a_killed_executor_left_is_swept_by_the_next_fit(cluster, cluster_session, frame):
    def kill_at(record):
        if record.round == 2 and not killed:
            killed.append(cluster.kill_executor(HOSTS[0], delete_folders=False))

    killed = []
    estimator(callbacks=[kill_at], epochs=1).fit(frame)
    assert killed
    estimator(epochs=1).fit(frame)
    left = [path for host in HOSTS for path in cluster.local_dir(host).rglob("sparkdeep-*")]
    assert left == []


@pytest.mark.fault(rows=[16], phases="TR")
def test_two_fits_at_the_same_time_do_not_meet(frame, undisturbed):
    results = {}

    def fit(name):
        results[name] = weights(estimator(rounds_per_stage=2).fit(frame))

    threads = [threading.Thread(target=fit, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    assert same_bits(results["first"], weights(undisturbed))
    assert same_bits(results["second"], weights(undisturbed))
