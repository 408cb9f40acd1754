"""Stages that the first version saved: each loads, also from inside a pipeline, and gives the numbers that it gave."""

from __future__ import annotations

import json

import pytest
from first_version import EXPECTED, FOLDER, written
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.tuning import CrossValidator
from pyspark.ml.util import DefaultParamsReader
from torch import nn

from sparkdeep import TorchEstimator, TorchModel
from sparkdeep.algorithms import slowmo

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def rows(spark):
    told = [(i, *row, row) for i, row in enumerate(written.ROWS)]
    return spark.createDataFrame(told, "id int, a double, b double, c double, x array<double>").coalesce(1)


def column(scored, name):
    return [list(row[name]) for row in sorted(scored.collect(), key=lambda row: row["id"])]


def approximately(numbers):
    return [pytest.approx(row, abs=1e-6) for row in numbers]


def same_settings(estimator, expected):
    """Every setting was read as what it was; modules and partials compare by what they are made of."""
    found = {param.name: estimator.getOrDefault(param) for param in estimator.params if estimator.isSet(param)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, nn.Module):
            assert (type(found[name]), repr(found[name])) == (type(value), repr(value))
            assert found[name].label_smoothing == value.label_smoothing
        elif name in ("optimizer", "outer_optimizer"):
            assert (found[name].func, found[name].keywords) == (value.func, value.keywords)
        else:
            assert found[name] == value, name
    return estimator.settings()


def of_estimator():
    return {**written.settings(), "feature_cols": "x", "probability_col": "probability", "num_workers": 2}


def of_stage():
    settings = {**written.settings(), "feature_cols": "features", "num_workers": 2, "algorithm": slowmo()}
    return {name: value for name, value in settings.items() if name not in ("outer_optimizer", "schedule")}


def test_its_model_predicts_what_it_did(rows):
    model = TorchModel.load(str(FOLDER / "model"))
    assert column(model.transform(rows), "probability") == approximately(EXPECTED["model"])
    assert [record.round for record in model.history] == [*range(1, len(model.history) + 1)]
    assert model.history


def test_its_pipeline_model_predicts_what_it_did(rows):
    model = PipelineModel.load(str(FOLDER / "pipeline_model"))
    assert type(model.stages[1]) is TorchModel
    assert column(model.transform(rows), "prediction") == approximately(EXPECTED["pipeline_model"])


def test_its_estimator_has_the_settings_that_it_had(spark):
    same_settings(TorchEstimator.load(str(FOLDER / "estimator")), of_estimator())
    same_settings(DefaultParamsReader.loadParamsInstance(str(FOLDER / "estimator"), spark), of_estimator())


def test_its_pipeline_has_the_settings_that_it_had(spark):
    assembler, estimator = Pipeline.load(str(FOLDER / "pipeline")).getStages()
    assert assembler.getInputCols() == ["a", "b", "c"]
    same_settings(estimator, of_stage())


def test_its_search_has_the_estimator_and_the_grid_that_it_had(spark):
    search = CrossValidator.load(str(FOLDER / "search"))
    same_settings(search.getEstimator(), of_estimator())
    assert [list(one.values()) for one in search.getEstimatorParamMaps()] == [[1], [2]]


def test_what_is_saved_now_names_the_public_classes_and_loads(rows, spark, tmp_path):
    """Read by Spark ML, which is told the class by the file alone."""
    PipelineModel.load(str(FOLDER / "pipeline_model")).write().save(str(tmp_path / "model"))
    Pipeline.load(str(FOLDER / "pipeline")).write().save(str(tmp_path / "pipeline"))
    CrossValidator.load(str(FOLDER / "search")).write().save(str(tmp_path / "search"))
    named = {json.loads(path.read_text())["class"] for path in tmp_path.rglob("metadata/part-*") if path.stat().st_size}
    assert {name for name in named if "spark.ml" not in name} == {"sparkdeep.TorchModel", "sparkdeep.TorchEstimator"}
    again = PipelineModel.load(str(tmp_path / "model"))
    assert column(again.transform(rows), "prediction") == approximately(EXPECTED["pipeline_model"])
    same_settings(Pipeline.load(str(tmp_path / "pipeline")).getStages()[1], of_stage())
    same_settings(CrossValidator.load(str(tmp_path / "search")).getEstimator(), of_estimator())
