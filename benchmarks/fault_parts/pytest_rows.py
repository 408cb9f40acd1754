"""A plugin of pytest: runs the tests that carry a row of the fault matrix, and writes a line of JSON for each.

python -m pytest -p fault_parts.pytest_rows --fault-lines lines.jsonl tests/...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_runtest_makereport"]

_COUNTED: Final = ("crash points", "unauthenticated calls", "fuzz inputs")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the lines go, and whether only tests that count something are run."""
    group = parser.getgroup("fault matrix")
    group.addoption("--fault-lines", type=Path, default=None, help="a file for one line of JSON a test")
    group.addoption("--fault-all", action="store_true", help="also tests without a row")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what carries no row."""
    if config.getoption("--fault-all"):
        return
    kept = [item for item in items if item.get_closest_marker("fault") is not None]
    left_out = [item for item in items if item.get_closest_marker("fault") is None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Write the test's line when it was called, or when it was not because its fixtures failed or it was skipped."""
    report = yield
    path = item.config.getoption("--fault-lines")
    if path is None or (report.when == "setup" and report.passed) or (report.when == "teardown" and report.passed):
        return report
    marks = [mark.kwargs for mark in item.iter_markers("fault")]
    line = {
        "test": item.nodeid,
        "rows": sorted({row for mark in marks for row in mark["rows"]}),
        "phases": {str(row): mark["phases"] for mark in marks for row in mark["rows"]},
        "outcome": report.outcome,
        "seconds": round(call.duration, 3),
        "counted": {
            name: value
            for name, value in item.user_properties
            if name.startswith(_COUNTED) and isinstance(value, int) and report.passed
        },
        "reason": "" if report.passed else str(report.longrepr)[-600:],
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return report
