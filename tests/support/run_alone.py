"""The last lines of a session that failed: each test that did, the line that it stopped at, and how to run it alone."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

MOST = 15  # so that all of it is within the last twenty lines


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    yield  # pytest's own summary, which may be long, comes first
    failed = {}
    for kind in ("failed", "error"):
        for report in terminalreporter.stats.get(kind, []):
            failed.setdefault(report.nodeid, report)
    if not failed:
        return
    terminalreporter.write_line(
        f"{len(failed)} failed; in the repository's root, each runs alone by the command after it:"
    )
    for report in list(failed.values())[:MOST]:
        terminalreporter.write_line(f"{place(report, config.rootpath)}: {command(report.nodeid)}")
    if len(failed) > MOST:
        terminalreporter.write_line(f"and {len(failed) - MOST} more, named in the summary above")


def place(report, root):
    """The last line of the traceback that stands in the test's folder, or the test's own: "file:line"."""
    file = report.nodeid.partition("::")[0]
    found = f"{file}:{report.location[1] + 1}" if getattr(report, "location", None) and report.location[1] else file
    for entry in getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", []):
        where = getattr(entry, "reprfileloc", None)
        path = root / where.path if where is not None else None
        if path is not None and path.is_relative_to(root / Path(file).parent):
            found = f"{path.relative_to(root)}:{where.lineno}"
    return found


def command(nodeid):
    """It stands in brackets as the setup may end its shell."""
    return f"(source .ci/setup.sh && python -m pytest {shlex.quote(nodeid)})"
