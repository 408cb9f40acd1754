"""What tests of this tier import: the rest of the tests, and the jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
# Behind everything else: `faults` is tests/faults.py, and not jobs/faults.py.
sys.path.extend(path for path in [str(_ROOT / "jobs")] if path not in sys.path)

pytest.register_assert_rewrite("invariants")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run that every other one is held against."""
    from invariants import train

    return train(tmp_path_factory.mktemp("undisturbed"))
