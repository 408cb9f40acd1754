"""The fuzzer in small: every input that was a finding once, and a moment of new ones, before every reader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from fuzzing import FoundError, fuzz  # the tier of its own that these files belong to has no package


def test_what_was_once_found_is_refused_by_name_and_so_are_some_new_inputs():
    counts = fuzz(1.5, seed=0)
    assert len(counts) >= 25


def test_a_reader_that_believes_a_length_is_found_out():
    with pytest.raises(FoundError, match=r"planted-index input .*IndexError"):
        fuzz(0.2, seed=0, only=["planted-index"])
