"""What the Spark UI shows of a fit, by its REST interface."""

from __future__ import annotations

import itertools
import re

import pytest
from watched_fit import watched

pytestmark = pytest.mark.jobs


@pytest.fixture(scope="module")
def found(spark):
    return watched(spark)


def stages(fit):
    """The descriptions of barrier stages, and the rounds that each really ran."""
    told = [text for text in fit["told"] if "round" in text]
    ran = [(first, after - 1) for first, after in itertools.pairwise([*fit["starts"], fit["rounds"] + 1])]
    return told, ran


def spans(descriptions, rounds):
    return [
        tuple(map(int, re.fullmatch(rf"sparkdeep fit: rounds (\d+)-(\d+) of {rounds}", text).groups()))
        for text in descriptions
    ]


def test_stages_of_a_fixed_number_of_rounds_say_which(found):
    told, ran = stages(found["fixed"])
    assert found["fixed"]["rounds"] >= 50
    assert spans(told, found["fixed"]["rounds"]) == ran
    assert ran[:2] == [(1, 20), (21, 40)]


def test_stages_that_choose_for_themselves_say_which_rounds_they_run_from_the_second_on(found):
    told, ran = stages(found["auto"])
    assert told[0] == f"sparkdeep fit: rounds from 1 of {found['auto']['rounds']}"
    # A round takes at least 40 ms, a stage at most a second; one may close early when rounds take longer than before.
    planned = spans(told[1:], found["auto"]["rounds"])
    assert len(planned) == len(ran) - 1 >= 2
    assert [first for first, _ in planned] == [first for first, _ in ran[1:]]
    assert all(last >= really for (_, last), (_, really) in zip(planned, ran[1:], strict=True))
    assert planned[-1] == ran[-1]


def test_a_callback_that_needs_the_slots_leaves_each_stage_one_round(found):
    told, ran = stages(found["callback"])
    assert ran == [(1, 1), (2, 2), (3, 3)]
    assert [re.sub(r"of \d+", "of N", text) for text in told] == [
        f"sparkdeep fit: rounds {n}-{n} of N" for n in (1, 2, 3)
    ]


def test_ingest_and_clean_up_are_named_too(found):
    told = found["fixed"]["told"]
    assert told[0] == "sparkdeep fit: ingest"
    assert "sparkdeep fit: clean up" in told
