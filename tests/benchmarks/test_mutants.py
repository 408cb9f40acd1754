"""A mutant is one change, of what a test can notice."""

from __future__ import annotations

import ast

from mutants import HEART, mutants_of
from paths import ROOT

SOURCE = '''
LIMIT = 3


def least(values: list[int], more: int = 1) -> int:
    """The least of them."""
    if not values or more < 0:
        raise ValueError(f"{values}: {3 + 4} are needed")
    values.sort()
    return values[0] + more
'''


def test_operators_numbers_results_and_calls_are_changed_one_at_a_time():
    found = mutants_of("least.py", SOURCE)
    assert sorted(mutant.change for mutant in found) == sorted(
        [
            "if not values or more < 0: -> if not (not values or more < 0)",
            "not values or more < 0 -> not values and more < 0",
            "more < 0 -> more <= 0",
            "0 -> 1",
            "values.sort() -> pass",
            "return values[0] + more -> return None",
            "values[0] + more -> values[0] - more",
            "0 -> 1",
        ]
    )
    plain = ast.dump(ast.parse(SOURCE))
    trees = {ast.dump(ast.parse(mutant.source)) for mutant in found}
    assert len(trees) == len(found)
    assert plain not in trees


def test_constants_defaults_and_messages_are_left_alone():
    for mutant in mutants_of("least.py", SOURCE):
        assert "LIMIT = 3" in mutant.source
        assert "more: int=1" in mutant.source
        assert "{3 + 4} are needed" in mutant.source


def test_those_that_are_drawn_are_the_same_every_time():
    drawn = mutants_of("least.py", SOURCE, 3)
    assert len(drawn) == 3
    assert drawn == mutants_of("least.py", SOURCE, 3)


def test_the_heart_is_there():
    assert all((ROOT / file).is_file() for file in HEART)
