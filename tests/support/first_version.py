"""The files that commit 25b478a wrote, the numbers that it had beside them, and what it wrote them from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).with_name("written_by_first_version")
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))

_spec = importlib.util.spec_from_file_location("written_by_first_version", FOLDER / "write.py")
written = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(written)
