"""What a session that failed tells last."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from paths import SUPPORT

TINY = """
import pytest

def helper():
    assert 1 == 2

def test_fails():
    helper()

@pytest.mark.parametrize("word", ["a b"])
def test_has_a_parameter(word):
    assert not word

@pytest.fixture
def broken():
    raise ValueError("not to be had")

def test_has_no_fixture(broken):
    pass

def test_passes():
    pass
"""


def last_lines(folder, text, *arguments):
    (folder / "tests").mkdir()
    (folder / "tests" / "test_tiny.py").write_text(textwrap.dedent(text))
    (folder / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "run_alone", *arguments, "tests"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()[-20:]


def told(place, name):
    return f"tests/test_tiny.py:{place}: (source .ci/setup.sh && python -m pytest {name})"


def test_each_failed_test_has_its_line_and_a_command_among_the_last_twenty_lines(tmp_path):
    code, lines = last_lines(tmp_path, TINY, "-p", "xdist.plugin", "-n", "1")
    assert code == 1
    assert [line for line in lines if ".ci/setup.sh" in line] == [
        told(5, "tests/test_tiny.py::test_fails"),
        told(12, "'tests/test_tiny.py::test_has_a_parameter[a b]'"),
        told(16, "tests/test_tiny.py::test_has_no_fixture"),
    ]
    assert any(line.startswith("3 failed;") for line in lines)


def test_many_are_told_in_part_and_none_leaves_no_word(tmp_path):
    (tmp_path / "many").mkdir()
    text = "import pytest\n@pytest.mark.parametrize('i', range(40))\ndef test_fails(i):\n    assert i < 0\n"
    _, lines = last_lines(tmp_path / "many", text)
    assert told(4, "'tests/test_tiny.py::test_fails[0]'") in lines
    assert "and 25 more, named in the summary above" in lines
    (tmp_path / "none").mkdir()
    code, lines = last_lines(tmp_path / "none", "def test_passes():\n    pass\n")
    assert code == 0
    assert "setup.sh" not in "".join(lines)
