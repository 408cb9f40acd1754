"""The doctor on a real local[2] session: sound, and broken in each way that a session can be broken while it runs."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from sparkdeep.errors import ConfigError
from sparkdeep.spark.doctor.doctor import doctor

pytestmark = pytest.mark.spark


def the(report, name):
    (found,) = (finding for finding in report.findings if finding.name == name)
    return found


@pytest.fixture(scope="module")
def warm(spark):
    """The session, with a Python worker for each slot that has imported torch."""
    doctor(spark)
    return spark


def test_a_sound_session_is_ok_within_ten_seconds_and_left_as_it_was(warm):
    threads = {thread.name for thread in threading.enumerate()}
    began = time.perf_counter()
    report = doctor(warm, num_workers=2)
    took = time.perf_counter() - began
    assert report.ok, str(report)
    assert not report.of("warn", "fail", "unknown"), str(report)
    assert 0 < report.seconds <= took < 40
    assert "one of 2 task(s)" in the(report, "barrier stages").seen
    assert the(report, "slots").seen.startswith("2")
    assert "2 task(s) dialed it" in the(report, "driver's port").seen
    assert "torch" in the(report, "versions").seen
    assert not warm.sparkContext.statusTracker().getActiveJobsIds()
    assert not warm.sparkContext.getJobTags()
    assert {t.name for t in threading.enumerate()} - threads <= {"sparkdeep-hello"}


def test_a_port_that_answers_but_is_not_the_driver(warm, monkeypatch):
    from sparkdeep.stages.coordinator import Coordinator

    monkeypatch.setattr(Coordinator, "route", lambda self, admit: None)  # it hangs up on whoever says hello
    found = the(doctor(warm), "driver's port")
    assert found.level == "fail"
    assert "did not answer as the driver" in found.seen


def test_a_port_that_is_taken(warm):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        report = doctor(warm, coordinator_port=taken.getsockname()[1])
    found = the(report, "driver's port")
    assert found.level == "fail"
    assert "in use" in found.seen
    assert the(report, "barrier stages").level == "ok"


def test_more_workers_than_slots(warm):
    found = the(doctor(warm, num_workers=3), "slots")
    assert found.level == "fail"
    assert "num_workers=3" in found.seen
    assert "lower num_workers" in found.change


def test_a_resource_profile_that_a_local_master_refuses(warm):
    found = the(doctor(warm, cpus_per_worker=2), "resource profile")
    assert found.level == "fail"
    assert "spark.task.cpus=2" in found.seen


@pytest.mark.fault(rows=[36], phases="PF")
def test_an_engine_that_ignores_the_barrier(warm, monkeypatch):
    from pyspark.sql.classic.dataframe import DataFrame

    original = DataFrame.mapInArrow
    monkeypatch.setattr(DataFrame, "mapInArrow", lambda self, f, schema, barrier=False: original(self, f, schema))
    report = doctor(warm)
    found = the(report, "barrier stages")
    assert found.level == "fail"
    assert "without a barrier" in found.seen
    assert "Photon" in found.change


def test_properties_of_the_session_are_read(warm, monkeypatch):
    from pyspark import SparkConf

    original = SparkConf.getAll
    broken = [("spark.dynamicAllocation.enabled", "true"), ("spark.python.worker.reuse", "false")]
    monkeypatch.setattr(SparkConf, "getAll", lambda self: [*original(self), *broken])
    report = doctor(warm)
    assert the(report, "dynamic allocation").level == "fail"
    assert the(report, "Python workers").level == "warn"


@pytest.mark.parametrize(
    "arguments", [{"num_workers": 0}, {"timeout_s": 0}, {"coordinator_port": "x"}], ids=lambda value: next(iter(value))
)
def test_an_argument_that_cannot_be_meant(spark, arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        doctor(spark, **arguments)
