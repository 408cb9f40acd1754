"""The wheel alone, in an environment of its own and away from the checkout: it trains, saves and loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(300)]

PROGRAM = """
import json, sys
from functools import partial
from importlib.resources import files

import torch
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits
from torch import nn

import sparkdeep
from sparkdeep import TorchEstimator, TorchModel


def where(_):
    import sparkdeep

    return sparkdeep.__file__, sys.path


spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
on_executor, executor_path = spark.sparkContext.parallelize([0], 1).map(where).first()
pixels, labels = load_digits(return_X_y=True)
rows = [((image / 16).tolist(), int(label)) for image, label in zip(pixels, labels)]
digits = spark.createDataFrame(rows, "pixels array<double>, label bigint")
model = TorchEstimator(model=nn.Linear, model_args={"in_features": 64, "out_features": 10}, loss=nn.CrossEntropyLoss(),
                       optimizer=partial(torch.optim.SGD, lr=0.5), feature_cols=["pixels"], label_cols="label",
                       num_workers=2, epochs=3, sync_every="epoch", seed=0, prediction="argmax").fit(digits)
model.save("model")
again = TorchModel.load("model")
accuracy = again.transform(digits).selectExpr("avg(double(label = prediction))").first()[0]
package = files("sparkdeep")
print(json.dumps({
    "accuracy": accuracy,
    "files": [sparkdeep.__file__, on_executor],
    "paths": [sys.path, executor_path],
    "data": [(package / name).is_file() for name in ("py.typed", "tracking/report.html.jinja")],
}))
spark.stop()
"""


def tracked():
    """Files of the checkout that git knows or would be told of, those that stand there."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def run(*command, cwd, timeout=120):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since a build leaves folders in its source."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in tracked():
        if name.startswith("sparkdeep/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", built,
        cwd=source,
    )  # fmt: skip
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment that holds the wheel, and sees the third-party packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel,
        cwd=folder,
    )  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    # Only now, so that pip finds no other sparkdeep to remove. Paths that stand in a .pth file are searched after `site`,
    # and their own .pth files, by which an editable install is found, are not read.
    (site / "third_party.pth").write_text("".join(f"{path}\n" for path in third_party()))
    return folder


def third_party():
    return [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked() if name.startswith("sparkdeep/")}


def test_it_trains_digits_and_loads_the_model_away_from_the_checkout(environment, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    python = environment / "bin/python"
    out = run(
        "env", f"PYSPARK_PYTHON={python}", f"PYSPARK_DRIVER_PYTHON={python}", "SPARK_LOCAL_IP=127.0.0.1",
        python, "program.py", cwd=tmp_path,
    )  # fmt: skip
    told = json.loads(out.splitlines()[-1])
    assert told["accuracy"] >= 0.85
    for file in told["files"]:  # on the driver, and in a task
        assert Path(file).is_relative_to(environment)
    for paths in told["paths"]:
        others = [environment, *third_party()]  # they may lie in the checkout's own .venv
        ours = [path for path in map(Path, paths) if path.is_relative_to(ROOT)]
        strays = [path for path in ours if not any(path.is_relative_to(other) for other in others)]
        assert not strays, "the checkout was on the path"
    assert told["data"] == [True, True]


def test_its_command_is_there(environment, tmp_path):
    assert "doctor" in run(environment / "bin/sparkdeep", "--help", cwd=tmp_path)
