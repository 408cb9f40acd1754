"""The doctor through Spark Connect: what can be seen there, and what is unknown."""

from __future__ import annotations

import pytest

from sparkdeep.spark.doctor.doctor import doctor

pytestmark = pytest.mark.connect


def the(report, name):
    (found,) = (finding for finding in report.findings if finding.name == name)
    return found


def test_a_sound_session_is_ok_and_says_what_it_does_not_show(spark):
    report = doctor(spark)
    assert report.ok, str(report)
    assert "Spark Connect" in report.session
    assert the(report, "barrier stages").seen.startswith("one of 2 task(s)")
    assert the(report, "slots").seen.startswith("at least 2")
    assert "memory overhead" in the(report, "Spark's settings").seen
    assert [finding.name for finding in report.of("unknown")] == ["Spark's settings"]
    assert "driver's port" not in {finding.name for finding in report.findings}, "none is opened there"


def test_a_stage_that_gets_no_slots_is_interrupted(spark):
    report = doctor(spark, num_workers=3, timeout_s=10)
    found = the(report, "barrier stages")
    assert found.level == "fail"
    assert "did not end within 10 s" in found.seen
    assert the(report, "versions").level == "ok", "told by plain tasks"
    assert doctor(spark).ok, "its slots are free again"
