"""A model that the first version logged to MLflow scores as it did."""

from __future__ import annotations

import os
import shutil

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before MLflow is imported: it would report to its makers

import mlflow
import numpy as np
import pandas as pd
import pytest
from first_version import EXPECTED, FOLDER, written

pytestmark = [
    pytest.mark.extras,
    pytest.mark.filterwarnings("default"),  # of MLflow and what it imports
]


def test_its_logged_model_predicts_what_it_did(tmp_path):
    shutil.copytree(FOLDER / "mlflow", tmp_path / "model")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert loaded.metadata.flavors["python_function"]["loader_module"] == "sparkdeep.spark.pyfunc"
    scored = loaded.predict(pd.DataFrame(written.ROWS, columns=["a", "b", "c"]))
    np.testing.assert_allclose(np.stack(list(scored["probability"])), EXPECTED["mlflow"], atol=1e-6)
