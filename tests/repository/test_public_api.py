from __future__ import annotations

import subprocess
import sys

import pytest

import sparkdeep

PUBLIC = [
    "AdaComm",
    "Asynchronous",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "CoordinatorUnreachableError",
    "DataError",
    "DyLU",
    "EMA",
    "EarlyStopping",
    "Epochs",
    "FedProx",
    "FitInfo",
    "Median",
    "ModelLoadError",
    "NonFiniteError",
    "NormClip",
    "PostLocal",
    "PreflightError",
    "QSR",
    "RadialDirectional",
    "ReplicaLostError",
    "SWA",
    "Scaffold",
    "ShardMismatchError",
    "SparkdeepError",
    "TorchEstimator",
    "TorchModel",
    "TrimmedMean",
    "UserCodeError",
    "VersionMismatchError",
    "WarmStart",
    "algorithms",
    "doctor",
    "greedy_soup",
    "petastorm",
    "register",
    "soup",
    "tracking",
]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_public_names_are_these():
    assert sorted(sparkdeep.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    assert getattr(sparkdeep, name).__name__.rpartition(".")[2] == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="TorchEstimater"):
        _ = sparkdeep.TorchEstimater


def test_import_brings_no_pyspark_and_starts_nothing():
    code = (
        "import sys, threading, os\n"
        "before = dict(os.environ)\n"
        "import sparkdeep\n"
        "loaded = sorted(m for m in sys.modules if m.split('.')[0] in {'pyspark', 'py4j', 'torch', 'numpy'})\n"
        "assert not loaded, loaded\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert dict(os.environ) == before\n"
        "children = open('/proc/self/task/%d/children' % os.getpid()).read() if os.path.exists('/proc') else ''\n"
        "assert not children, children\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_import_check_would_see_pyspark():
    done = run_python("import sys, sparkdeep, pyspark\nassert not any(m == 'pyspark' for m in sys.modules)")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
