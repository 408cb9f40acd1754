"""Every row of the fault matrix is shown by a test that carries its number, or says why it cannot be."""

from __future__ import annotations

import ast
import functools
import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fault_parts import soak, soak_plan, tables, unguarded
from fault_parts.catalogue import PHASES, phases_in, read_rows
from paths import ROOT

ROWS = read_rows()

# Rows that no test here can show: number -> reason.
CANNOT: dict[int, str] = {}
# Rows whose tests are under way; empty when they are there.
WAITING: set[int] = set()


def marks_in(tree):
    """(rows, phases) of every `pytest.mark.fault(...)`, wherever it stands: a decorator, `pytestmark`, a parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            assert not node.args, f"line {node.lineno}: rows= and phases= by name"
            assert given.keys() == {"rows", "phases"}, f"line {node.lineno}: rows= and phases=, both"
            yield given["rows"], given["phases"]


@functools.cache
def all_marks():
    """(file, rows, phases) of every mark."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("tests/**/*.py"))}
    return [
        (path, *mark)
        for path, text in texts.items()
        if path != Path(__file__).resolve() and "mark.fault" in text
        for mark in marks_in(ast.parse(text))
    ]


def test_the_catalogue_has_42_rows_in_order_with_phases_that_there_are():
    assert [row.number for row in ROWS] == list(range(1, 43))
    for row in ROWS:
        assert row.phases
        assert set(row.phases) <= set(PHASES)
        assert row.fault
        assert row.expected


def test_every_row_is_shown_by_a_test_or_says_why_not():
    shown = {number for _, rows, _ in all_marks() for number in rows}
    assert shown <= {row.number for row in ROWS}
    missing = {row.number for row in ROWS} - shown - CANNOT.keys()
    assert missing <= WAITING, "give their tests @pytest.mark.fault(rows=[...], phases=...)"
    assert not WAITING & shown, "they have their tests now: take them out of WAITING"
    assert not CANNOT.keys() & shown, "they have their tests now: take them out of CANNOT"
    assert all(CANNOT.values())


def test_marks_name_rows_and_phases():
    assert all_marks()
    for path, rows, phases in all_marks():
        assert rows, path
        assert all(isinstance(number, int) for number in rows), path
        assert phases_in(phases), path


def test_marks_are_found_wherever_they_stand():
    source = """
pytestmark = pytest.mark.fault(rows=[1], phases="TR")
@pytest.mark.fault(rows=[2, 3], phases="LD, TR")
def test_x(): ...
@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.fault(rows=[4], phases="RS"))])
def test_y(x): ...
"""
    assert sorted(marks_in(ast.parse(source))) == [([1], "TR"), ([2, 3], "LD, TR"), ([4], "RS")]
    with pytest.raises(AssertionError, match="both"):
        list(marks_in(ast.parse("pytest.mark.fault(rows=[1])")))
    with pytest.raises(ValueError, match="'XX' is none of PF"):
        phases_in("TR,XX")


# -- what benchmarks/faults.py makes of what the tests say -----------------------------------------------------------------------


def line(rows, outcome, phases="TR", **more):
    return {
        "test": "tests/test_x.py::test_it",
        "rows": rows,
        "phases": {str(number): phases for number in rows},
        "outcome": outcome,
        "seconds": 1.0,
        "counted": {},
        "reason": "",
        **more,
    }


def test_a_row_passes_when_all_its_tests_do_and_says_which_phases_they_show():
    lines = [
        line([3], "passed", "LD,TR", tier="cluster"),
        line([3, 4], "passed", test="tests/test_y.py::test_another", tier="local"),
        line([4], "failed", reason="boom"),
        line([5], "skipped", reason="no GPU"),
    ]
    verdicts = {verdict["number"]: verdict for verdict in tables.verdicts(ROWS, lines)}
    assert (verdicts[3]["verdict"], verdicts[3]["shown"], verdicts[3]["open"]) == ("passed", ["LD", "TR"], ["RT"])
    assert (verdicts[3]["tests"], verdicts[3]["seconds"]) == (2, 2.0)
    assert verdicts[4]["verdict"] == "FAILED"
    assert "test_it" in verdicts[4]["why"]
    assert (verdicts[5]["verdict"], verdicts[5]["why"]) == ("not run", "no GPU")
    assert (verdicts[6]["verdict"], verdicts[6]["why"]) == ("not run", "no test of the tiers that were run carries it")
    text = tables.matrix_table(list(verdicts.values()))
    assert "| 3 | a Python worker is killed | LD TR (not RT) | cluster local | passed | 2 |" in text


def test_a_test_that_passes_and_then_fails_to_clean_up_has_failed():
    lines = [line([3], "passed"), line([3], "failed", reason="left behind")]
    assert tables.verdicts(ROWS, lines)[2]["verdict"] == "FAILED"


def test_what_tests_count_is_added_up_by_name():
    lines = [
        line([22], "passed", counted={"crash points: a": 3}),
        line([23], "passed", counted={"crash points: a": 4, "fuzz inputs: b": 1}),
    ]
    assert tables.counted(lines, "crash points") == {"a": 7}
    assert tables.counted(lines, "fuzz inputs") == {"b": 1}
    assert tables.counted(lines, "unauthenticated calls") == {}


# -- the soak ----------------------------------------------------------------------------------------------------------------


def test_a_soaks_faults_follow_from_its_seed_and_come_every_few_rounds():
    planned = soak_plan.plan_faults(200, 1)
    assert planned == soak_plan.plan_faults(200, 1) != soak_plan.plan_faults(200, 2)
    rounds = [number for number, _, _ in planned]
    assert rounds[0] >= 2
    assert rounds[-1] < 200
    assert all(number % soak_plan.ROUNDS_AN_EPOCH for number in rounds)
    assert all(2 <= later - earlier <= 7 for earlier, later in itertools.pairwise(rounds))
    assert {kind for _, kind, _ in planned} == set(soak_plan.KINDS)


def test_the_slope_is_that_of_least_squares():
    assert soak_plan.slope([5.0, 7.0, 9.0, 11.0]) == pytest.approx(2.0)
    values = [1.0, 4.0, 2.0, 8.0, 3.0]
    assert soak_plan.slope(values) == pytest.approx(np.polyfit(range(5), values, 1)[0])


def soaked(**changes):
    slopes = dict.fromkeys(("driver_mb", "jvm_mb", "descriptors", "threads", "files"), 0.0)
    result = {
        "rounds": 3, "planned": 2, "never happened": [], "differing tensors": [], "same losses": True,
        "rounds told": [1, 2, 3], "rounds begun": 5, "slopes": slopes,
    }  # fmt: skip
    return {**result, **changes, "slopes": {**slopes, **changes.get("slopes", {})}}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"never happened": [[2, "worker stopped", 0]]}, "never happened"),
        ({"differing tensors": ["weight"]}, "weight"),
        ({"same losses": False}, "losses"),
        ({"rounds told": [1, 3]}, "gap"),
        ({"rounds begun": 6}, "3 rounds of work lost to 2"),
        ({"slopes": {"driver_mb": 0.1}}, "memory grew by 0.100"),
        ({"slopes": {"descriptors": 0.5}}, "descriptors grew"),
        ({"slopes": {"files": 0.5}}, "files grew"),
    ],
)
def test_a_soak_that_keeps_no_promise_says_which(changes, word):
    assert soak.problems(soaked()) == []
    (problem,) = soak.problems(soaked(**changes))
    assert word in problem


def test_a_soak_that_is_not_over_in_time_is_interrupted_and_one_that_fails_is_an_error(tmp_path):
    script = "import time\ntry:\n open({!r}, 'w').close()\n time.sleep(60)\nexcept KeyboardInterrupt: open({!r}, 'w').close()"
    up, heard = tmp_path / "up", tmp_path / "heard"
    child = subprocess.Popen([sys.executable, "-c", script.format(str(up), str(heard))])
    deadline = time.monotonic() + 60.0
    while not up.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=r"not over after 0\.1 s"):
        soak._finish(child, timeout_s=0.1)
    assert heard.exists()
    with pytest.raises(RuntimeError, match="exit code 3"):
        soak._finish(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), timeout_s=30.0)


# -- without guards ------------------------------------------------------------------------------------------------------------


def test_every_guard_is_found_taken_out_and_put_back():
    from sparkdeep.protocol import refusals, wire
    from sparkdeep.replica.link import ReplicaLink
    from sparkdeep.stages import opener as stages

    def now():
        return (refusals.Checksum, stages.check_shard, wire.hmac, ReplicaLink.beat, wire.Connection._read)

    before = now()
    with unguarded.unguarded():
        assert not set(map(id, now())) & set(map(id, before))
        assert refusals.Checksum(b"a").digest() == refusals.Checksum(b"b").digest()
    assert now() == before


def test_a_guard_that_has_moved_is_an_error(monkeypatch):
    from sparkdeep.stages import opener as stages

    monkeypatch.delattr(stages, "check_shard")
    with pytest.raises(LookupError, match=r"sparkdeep\.stages\.opener has no check_shard"), unguarded.unguarded():
        pass
