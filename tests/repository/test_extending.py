"""The examples of docs/extending.md: each diff applies, touches few files, and what it adds works; without it, it does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import extended
import pytest
from paths import PACKAGE, ROOT, SUPPORT

from sparkdeep.errors import ConfigError, DataError

EXAMPLES = {  # by the function of tests/support/extended.py: files that it may touch, and what fails without it
    "aggregator": (3, ImportError),
    "codec": (2, ConfigError),
    "rule": (3, ImportError),
    "column": (2, DataError),
}
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
DIFFS = dict(zip(EXAMPLES, re.findall(r"^```diff\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL), strict=True))


def touched(diff):
    return re.findall(r"^\+\+\+ b/(\S+)", diff, flags=re.MULTILINE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_touches_few_files_and_does_what_it_says(tmp_path, name):
    files = touched(DIFFS[name])
    assert all(file.startswith("sparkdeep/") for file in files)
    assert 0 < len(files) <= EXAMPLES[name][0]
    shutil.copytree(PACKAGE, tmp_path / "sparkdeep")
    for file in ("extended.py", "twin.py"):
        shutil.copy(SUPPORT / file, tmp_path)
    # Beside a repository that may lie above, whose files these are not.
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    options = {"cwd": tmp_path, "env": env, "text": True, "capture_output": True, "check": False}
    applied = subprocess.run(["git", "apply", "-"], input=DIFFS[name], **options)
    assert applied.returncode == 0, applied.stderr
    code = (
        f"import pathlib, torch, extended; torch.set_num_threads(1); extended.{name}(pathlib.Path('fits').absolute())"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, **options)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_its_change_what_an_example_adds_is_not_there(tmp_path, name):
    with pytest.raises(EXAMPLES[name][1]):
        getattr(extended, name)(tmp_path)
