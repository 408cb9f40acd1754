"""What tests of this tier share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("invariants")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run that every other one is held against."""
    from invariants import train

    return train(tmp_path_factory.mktemp("undisturbed"))
