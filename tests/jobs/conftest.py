"""One session for the tests of this tier; what executors need to import is set before the JVM starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_ROOT), str(_ROOT / "jobs"), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH", "")])]
)
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
sys.path.extend(path for path in (str(_ROOT / "jobs"), str(Path(__file__).parent)) if path not in sys.path)
