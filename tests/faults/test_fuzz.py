"""Random and mutated bytes before every reader: read, or refused by name; no crash, no hang, no unbounded memory."""

from __future__ import annotations

import pytest
from fuzz_planted import targets
from fuzzing import FoundError, fuzz, input_of

SECONDS = 45.0
"""Of mutants, divided among the targets; with the child's start and the cases about a minute."""


def test_every_reader_of_foreign_bytes_reads_or_refuses_by_name():
    counts = fuzz(SECONDS, seed=0)
    assert len(counts) >= 25
    assert all(counts.values()), f"a target had no time for a single input: {counts}"


@pytest.mark.parametrize(
    ("kind", "sign"),
    [("index", "IndexError"), ("memory", "DataError: too long"), ("hang", "TooSlowError"), ("crash", "exit -6")],
)
def test_a_planted_bug_is_found(kind, sign):
    with pytest.raises(FoundError, match=rf"planted-{kind} input \d+ of seed 3: {sign}"):
        fuzz(1.0, seed=3, only=[f"planted-{kind}"])


def test_an_input_follows_from_its_seed_and_number():
    (target, *_) = targets(None)
    assert input_of(target, 1, 5) == input_of(target, 1, 5)
    inputs = {input_of(target, seed, number) for seed in (1, 2) for number in range(50)}
    assert len(inputs) > 60
