"""Stages say which rounds they will run, and run those: planned from what was measured, before they open."""

from __future__ import annotations

import itertools
import re
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from twin import deal, run, schema_of
from twin_faults import Plan, Watched, marked_table

from sparkdeep.models.program import Program
from sparkdeep.rounds.transport import rounds_to_run, stage_description
from sparkdeep.stages.opener import SocketReplicas
from sparkdeep.tracking.records import RoundRecord


def stage(rounds, *, round_s, opening_s):
    """Records of one stage."""
    times = [round_s + (opening_s if i == 0 else 0.0) for i in range(rounds)]
    return [
        RoundRecord(round=i + 1, epoch=1, rows=8, loss=0.5, seconds=t, stage_seconds=opening_s if i == 0 else 0.0)
        for i, t in enumerate(times)
    ]


def planned(records, *, left=1000, per_stage="auto", max_stage_s=60.0):
    return rounds_to_run(records, left=left, rounds_per_stage=per_stage, max_stage_s=max_stage_s)


@pytest.mark.parametrize(
    ("records", "options", "expected"),
    [
        ([], {}, None),
        ([], {"left": 1}, 1),
        ([], {"per_stage": 30}, 30),
        ([], {"per_stage": 30, "left": 12}, 12),
        (stage(4, round_s=0.5, opening_s=0.2), {}, 10),  # 25 x 0.2 s of work
        (stage(4, round_s=0.5, opening_s=0.2), {"left": 3}, 3),
        (stage(1, round_s=0.5, opening_s=10.0), {}, 108),  # 0.9 x 60 s of work
        (stage(1, round_s=100.0, opening_s=0.2), {}, 1),
        (stage(4, round_s=2.0, opening_s=0.2), {"per_stage": 100}, 27),
        (stage(4, round_s=2.0, opening_s=0.2), {"per_stage": 5}, 5),
        # The last stage counts, not the cold first one.
        (stage(3, round_s=9.0, opening_s=9.0) + stage(2, round_s=0.1, opening_s=0.1), {}, 25),
        (stage(2, round_s=0.0, opening_s=0.1), {}, 1000),
        (stage(2, round_s=0.5, opening_s=0.1), {"left": 0}, 0),
        ([], {"left": 0}, 0),
    ],
)
def test_a_plan_follows_what_the_last_stage_measured(records, options, expected):
    assert planned(records, **options) == expected


@given(
    round_s=st.floats(1e-3, 200.0),
    opening_s=st.floats(1e-3, 60.0),
    max_stage_s=st.floats(0.1, 600.0),
    left=st.integers(1, 10_000),
)
def test_a_plan_keeps_opening_under_five_percent_and_the_stage_under_its_limit(round_s, opening_s, max_stage_s, left):
    rounds = planned(stage(3, round_s=round_s, opening_s=opening_s), left=left, max_stage_s=max_stage_s)
    assert 1 <= rounds <= left
    work_s = rounds * round_s
    assert rounds == 1 or work_s <= max_stage_s
    limited = rounds == left or (rounds + 1) * round_s > 0.9 * max_stage_s * 0.999
    assert limited or opening_s <= 0.05 * work_s


def test_a_stage_is_described_by_its_rounds():
    assert stage_description(30, 30, 100) == "sparkdeep fit: rounds 31-60 of 100"
    assert stage_description(99, 1, 100) == "sparkdeep fit: rounds 100-100 of 100"
    assert stage_description(0, None, 100) == "sparkdeep fit: rounds from 1 of 100"
    assert stage_description(100, 0, 100) == "sparkdeep fit: scores and checkpoint of round 100 of 100"


# -- on the in-process twin ---------------------------------------------------------------------------------------------

SIZES = [40, 32]
X, Y = marked_table(SIZES)


class Told(Watched):
    """A launcher that keeps what its stages were called."""

    def __init__(self, plan, inner):
        super().__init__(plan, inner)
        self.described = []

    def launch(self, ticket, description):
        self.described.append(description)
        return super().launch(ticket, description)


class SlowHook:
    def __call__(self, features):
        time.sleep(0.02)
        return features


def described(tmp_path, *, augment=None, epochs=12, **options):
    """Runs five rounds an epoch; returns the stages' descriptions, and the rounds that each really ran."""
    launchers = []

    def wrap(inner):
        launchers.append(Told(Plan(), inner))
        return launchers[0]

    torch.manual_seed(0)
    program = Program(model=nn.Linear(4, 1), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.01), augment=augment)
    options = {"epochs": epochs, "batch_size": 4, "sync_every": 2, **options}
    _, records, _ = run(tmp_path, program, deal(X, Y, SIZES), schema_of(X, Y), wrap=wrap, **options)
    starts = [record.round for record in records if record.stage_seconds > 0]
    ran = [(first, after - 1) for first, after in itertools.pairwise([*starts, len(records) + 1])]
    return launchers[0].described, ran


def spans(descriptions, of=60):
    found = [re.fullmatch(rf"sparkdeep fit: rounds (\d+)-(\d+) of {of}", text) for text in descriptions]
    assert all(found), descriptions
    return [tuple(map(int, match.groups())) for match in found]


def test_a_fixed_number_of_rounds_a_stage_is_what_the_descriptions_say(tmp_path):
    descriptions, ran = described(tmp_path, rounds_per_stage=25)
    assert spans(descriptions) == ran == [(1, 25), (26, 50), (51, 60)]


def test_after_the_first_stage_auto_says_beforehand_which_rounds_it_runs(tmp_path, monkeypatch):
    # Opening costs 10 ms, a round at least 40: the first stage is closed by the clock long before round 30.
    opened = SocketReplicas._open

    def cheaply(stages, *arguments):
        stage = opened(stages, *arguments)
        stages._opening_s = 0.01
        return stage

    monkeypatch.setattr(SocketReplicas, "_open", cheaply)
    descriptions, ran = described(tmp_path, augment=SlowHook(), rounds_per_stage="auto", epochs=6)
    assert descriptions[0] == "sparkdeep fit: rounds from 1 of 30"
    assert len(ran) >= 2
    assert ran[0][1] < 30
    assert spans(descriptions[1:], of=30) == ran[1:]


def test_no_stage_stays_open_longer_than_it_may_whatever_was_planned(tmp_path):
    # Rounds of at least 40 ms each: no stage has room for more than 8.
    descriptions, ran = described(tmp_path, augment=SlowHook(), rounds_per_stage=60, max_stage_s=0.35, epochs=6)
    assert all(last - first + 1 <= 8 for first, last in ran)
    assert len(descriptions) == len(ran)
