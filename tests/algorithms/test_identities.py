"""Every identity of the algorithms is shown by a test that carries its number, wherever that test stands."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from paths import TESTS

IDENTITIES = {
    1: "one replica with averaging is a plain loop over the same batches, to the last bit, across a resume too",
    2: "the mean of identical replicas is the replica, and no order of arrival or transport changes a bit",
    3: "at a round a step, SGD of every kind is one big batch; with gradient rounds Adam is as well",
    4: "uneven shards weigh their rows, and an empty one changes nothing",
    5: "an outer step moves towards the mean, and the loss falls",
    6: "on quadratics a round is a mean of closed forms; with one Hessian it is the steps of one machine",
    7: "with unlike Hessians averaging has its own fixed point, SCAFFOLD the optimum, and FedProx one between them",
    8: "with unequal steps the bias of FedNova vanishes with the rate, and that of the mean does not",
    9: "every outer step is its paper's recurrence",
    10: "a gradient of portions is that of all rows; L-BFGS is torch's, finds scipy's optimum, one stage an evaluation",
    11: "a code errs by half a step at most, and with feedback what is sent adds up to what was meant",
    12: "the radial-directional mean keeps its length; median and trimmed mean withstand a replica gone wild",
    13: "a replica that is not finite is as if it had not been there; when none is left nothing moves",
    14: "pooled statistics are those of all rows; tied, frozen and integer tensors survive",
    15: "DiLoCo without delay is its recurrence, and in how many fragments vectors travel changes not a bit",
    16: "asynchronous with nobody late is synchronous, and a script of arrivals is its written-out trace",
    17: "who has which rows, one replica in two, a scaled loss: the same; bfloat16 replicas have a float32 master",
    18: "torch's PostLocalSGDOptimizer, optax and Flower give the same where they mean the same",
}


@functools.cache
def numbers_of(path: Path) -> dict[str, set[int]]:
    """Test -> the identities that its decorators name."""
    found: dict[str, set[int]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [
                d
                for d in node.decorator_list
                if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.identity"
            ]
            if marks:
                found[node.name] = {arg.value for mark in marks for arg in mark.args if isinstance(arg, ast.Constant)}
    return found


def test_every_number_is_one_of_these_and_none_is_left_out():
    shown = {number for path in TESTS.rglob("test_*.py") for marks in numbers_of(path).values() for number in marks}
    assert shown == set(IDENTITIES)


@pytest.mark.parametrize("number", IDENTITIES)
def test_an_identity_is_shown_without_a_jvm(number):
    quick = [*(TESTS / "unit").rglob("test_*.py"), *(TESTS / "algorithms").glob("test_*.py")]
    assert any(number in marks for path in quick for marks in numbers_of(path).values())
