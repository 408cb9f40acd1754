"""The in-process twin keeps the launchers' contract."""

from __future__ import annotations

import contextlib
import threading

import launcher_contract
import pytest
from launcher_contract import *  # noqa: F403 (the contract's tests, collected here with the twin's world)
from twin import local_coordinator, make_fit


class TwinWorld:
    """Replicas are threads of this process, and print where it prints."""

    def __init__(self, tmp_path):
        self._tmp_path = tmp_path

    @contextlib.contextmanager
    def fit(self, program, parts, schema, **options):
        coordinator = local_coordinator()
        try:
            yield make_fit(self._tmp_path, program, parts, schema, coordinator=coordinator, **options)
        finally:
            coordinator.close()

    def running(self):
        return [t.name for t in threading.enumerate() if t.name.startswith("sparkdeep-replica")]

    def printed(self, capfd, lines):
        return capfd.readouterr().out


@pytest.fixture
def world(tmp_path):
    return TwinWorld(tmp_path)


def test_the_contract_is_collected_whole():
    promised = [name for name in dir(launcher_contract) if name.startswith("test_")]
    assert len(promised) == 7
    assert all(name in globals() for name in promised)
