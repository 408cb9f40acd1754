"""The doctor on sessions that are broken in ways that take seconds to see, and the command itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from sparkdeep.spark.doctor.doctor import doctor

pytestmark = pytest.mark.jobs


def the(report, name):
    (found,) = (finding for finding in report.findings if finding.name == name)
    return found


@pytest.fixture(scope="module")
def warm(spark):
    """The session, with a Python worker for each slot that has imported torch."""
    doctor(spark)
    return spark


def sleep_in_a_task(batches):
    for batch in batches:
        time.sleep(60)
        yield batch


def test_an_address_that_executors_cannot_reach(warm):
    # A loopback address too, but not the one on which the driver listens.
    report = doctor(warm, coordinator_host="127.0.0.9")
    found = the(report, "driver's port")
    assert not report.ok
    assert "no connection to 127.0.0.9:" in found.seen
    assert "refused" in found.seen
    assert "coordinator_host=" in found.change
    assert [finding.name for finding in report.of("fail")] == ["driver's port"]


def test_slots_that_another_job_holds(warm):
    context = warm.sparkContext
    busy = warm.range(0, 1, 1, 1).mapInArrow(sleep_in_a_task, "id long")

    def hold():
        context.addJobTag("busy")
        try:
            busy.collect()
        except Exception:
            return  # cancelled below

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    try:
        deadline = time.monotonic() + 30
        while not context.statusTracker().getActiveStageIds():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        report = doctor(warm, timeout_s=12)
        assert len(context.statusTracker().getActiveJobsIds()) == 1, "its own job is cancelled, and no other"
    finally:
        context.cancelJobsWithTag("busy")
        holder.join(timeout=30)
    found = the(report, "barrier stages")
    assert found.level == "fail"
    assert "did not end within 12 s" in found.seen
    assert "other jobs" in found.change
    assert the(report, "versions").level == "ok", "plain tasks had one slot"


@pytest.mark.fault(rows=[34], phases="PF")
def test_executors_without_torch(warm, monkeypatch):
    # None in sys.modules is an import that fails, on the workers: the task carries the change with it.
    from sparkdeep.spark.doctor import probes

    monkeypatch.setattr(probes, "look_task", without_torch)
    report = doctor(warm)
    found = the(report, "versions")
    assert found.level == "fail"
    assert "torch missing on" in found.seen
    assert "spark.archives" in found.change


def without_torch(job, batches):
    import sys

    from sparkdeep.spark.doctor.probes import look_task

    kept = sys.modules.get("torch")
    sys.modules["torch"] = None
    try:
        yield from look_task(job, batches)
    finally:
        sys.modules.pop("torch")
        if kept is not None:
            sys.modules["torch"] = kept


def command(*arguments):
    """Runs `sparkdeep doctor` as a program of its own; workers are forked with torch imported, to be there sooner."""
    given = ("spark.ui.enabled=false", "spark.python.daemon.module=sparkdeep.spark.daemon")
    options = [option for conf in given for option in ("--conf", conf)]
    return subprocess.run(
        [sys.executable, "-m", "sparkdeep", "doctor", *options, *arguments],
        env={key: value for key, value in os.environ.items() if key != "PYSPARK_SUBMIT_ARGS"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_starts_a_session_with_the_properties_of_a_file(tmp_path):
    properties = tmp_path / "my.conf"
    properties.write_text("# ours\nspark.master local[3]\nspark.python.worker.reuse false\n")
    ran = command("--properties-file", str(properties), "--conf", "spark.driver.host=127.0.0.1", "--num-workers", "3")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "local[3]" in ran.stdout
    assert "barrier stages: one of 3 task(s)" in ran.stdout
    assert "WARN  Python workers: spark.python.worker.reuse=false" in ran.stdout
    assert "sparkdeep can train here" in ran.stdout


def test_the_command_ends_with_1_where_spark_itself_refuses_the_barrier():
    dynamic = {"enabled": "true", "minExecutors": "2", "shuffleTracking.enabled": "true"}
    options = [
        option for name, value in dynamic.items() for option in ("--conf", f"spark.dynamicAllocation.{name}={value}")
    ]
    ran = command("--master", "local-cluster[2,1,1024]", "--timeout", "60", *options)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "FAIL  dynamic allocation" in ran.stdout
    assert "FAIL  barrier stages: barrier stages do not run with dynamic allocation" in ran.stdout
    assert "ok    versions: the same on" in ran.stdout, "told by plain tasks"
    assert "sparkdeep cannot train here" in ran.stdout
