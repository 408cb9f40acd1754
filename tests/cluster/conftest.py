"""The rows that faults strike, and the run that none struck."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def frame(cluster_session):
    from cluster_models import rows

    return rows(cluster_session).cache()


@pytest.fixture(scope="session")
def _undisturbed():
    """A list of the one model, once it is trained: it outlives a session."""
    return []


@pytest.fixture(scope="module")
def undisturbed(frame, _undisturbed):
    from cluster_models import estimator

    if not _undisturbed:
        _undisturbed.append(estimator().fit(frame))
    return _undisturbed[0]
