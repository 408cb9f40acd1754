from __future__ import annotations

import logging

from sparkdeep.tracking.callbacks import Phases, StartUp
from sparkdeep.tracking.records import RoundRecord


def test_phases_follow_each_other_and_the_first_rounds_own_work_is_none_of_them(caplog):
    now = [100.0]
    phases = Phases(clock=lambda: now[0])
    for phase, seconds in (("checks", 1.0), ("ingest", 4.0), ("rehearsal", 0.5)):
        now[0] += seconds
        phases.end(phase)
    assert phases.startup is None
    now[0] += 0.25 + 2.0 + 3.0  # checkpoints, a stage that opens, a round
    caplog.set_level(logging.INFO, logger="sparkdeep")
    phases(RoundRecord(round=1, epoch=1, rows=1, loss=0.0, seconds=5.0, stage_seconds=2.0))
    expected = StartUp(checks_s=1.0, ingest_s=4.0, rehearsal_s=0.5, opening_s=2.25)
    assert phases.startup == expected
    assert expected.total_s == 7.75
    now[0] += 50
    phases(RoundRecord(round=2, epoch=1, rows=1, loss=0.0, seconds=50.0))
    assert phases.startup == expected
    assert [record.getMessage() for record in caplog.records] == [
        "7.75 s before the first step: checks 1.00, ingest 4.00, rehearsal 0.50, opening the first stage 2.25"
    ]
