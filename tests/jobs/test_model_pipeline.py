"""Pipelines with a network: saved and loaded as Spark ML does, on local[2]."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.tuning import (
    CrossValidator,
    CrossValidatorModel,
    ParamGridBuilder,
    TrainValidationSplit,
    TrainValidationSplitModel,
)
from pyspark.sql import functions as F
from torch import nn

from sparkdeep import ModelLoadError, TorchEstimator, TorchModel, register

pytestmark = pytest.mark.jobs

COLUMNS = ["prediction", "probability", "rawPrediction"]


class Net(nn.Module):
    """8 inputs, 3 classes."""

    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x):
        return self.layers(x)


@register
def centered(features):
    return features - 1.0


@pytest.fixture(scope="module")
def frame(spark):
    """120 rows: x0 to x7, a label that they tell."""
    columns = [((F.col("id") * (j + 3)) % 17 / 8).alias(f"x{j}") for j in range(8)]
    return (
        spark.range(120).select("id", *columns).withColumn("label", (F.col("x0") + F.col("x1")).cast("int") % 3).cache()
    )


@pytest.fixture(scope="module")
def stages():
    assembler = VectorAssembler(inputCols=[f"x{i}" for i in range(8)], outputCol="features")
    estimator = TorchEstimator(
        model=Net,
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        featuresCol="features",
        labelCol="label",
        preprocess=centered,
        probability_col="probability",
        raw_prediction_col="rawPrediction",
        num_workers=2,
        epochs=1,
        seed=0,
        progress=False,
    )
    return assembler, estimator


@pytest.fixture(scope="module")
def fitted(stages, frame):
    return Pipeline(stages=list(stages)).fit(frame)


def scores(model, frame):
    return model.transform(frame.coalesce(1)).orderBy("id").select(COLUMNS).collect()


def test_a_saved_pipeline_model_gives_the_same_bits(spark, fitted, frame, tmp_path):
    path = (tmp_path / "pipeline").as_uri()
    fitted.save(path)
    again = PipelineModel.load(path)
    assert [stage.uid for stage in again.stages] == [stage.uid for stage in fitted.stages]
    assert again.stages[1].history[-1].loss == fitted.stages[1].history[-1].loss
    expected = scores(fitted, frame)
    assert scores(again, frame) == expected
    with torch.no_grad():
        again.stages[1].model.layers[0].bias.add_(1.0)
    assert scores(again, frame) != expected
    fitted.write().overwrite().save(path)
    assert scores(PipelineModel.load(path), frame) == expected


def test_a_relative_path_means_to_a_stage_what_it_means_to_spark(spark, fitted, frame, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Spark stays where it was started
    fitted.stages[1].save("here")
    assert (tmp_path / "here/metadata.json").is_file()
    from_spark = os.path.relpath(tmp_path / "pipeline", spark._jvm.System.getProperty("user.dir"))
    fitted.save(from_spark)
    assert (tmp_path / "pipeline/metadata").is_dir()
    assert scores(PipelineModel.load(from_spark), frame) == scores(fitted, frame)


def test_what_loading_may_not_name_is_said_with_the_remedy(fitted, frame, tmp_path):
    class Unreachable(Net):
        pass

    model = fitted.stages[1]
    hidden = TorchModel(module=Unreachable(), schema=model._schema)
    path = str(tmp_path / "pipeline")
    PipelineModel(stages=[hidden]).save(path)
    with pytest.raises(ModelLoadError, match=r"does not name its model's class: load with model=Net"):
        PipelineModel.load(path)
    stage = next((tmp_path / "pipeline/stages").iterdir())
    assert isinstance(TorchModel.load(str(stage), model=Unreachable).model, Unreachable)


def test_a_fit_hands_on_uid_columns_and_callables(stages, fitted, frame):
    estimator, model = stages[1], fitted.stages[1]
    assert model.uid == estimator.uid
    assert model.getProbabilityCol() == "probability"
    assert model.getFeatureCols() == "features"
    # CrossValidator sends an estimator's param map to its model, params that a model lacks included.
    scored = fitted.transform(frame, {estimator.prediction_col: "other", estimator.epochs: 9})
    assert "other" in scored.columns
    assert "prediction" not in scored.columns


@pytest.mark.parametrize(
    ("search", "loader", "ratio"),
    [(CrossValidator, CrossValidatorModel, {"numFolds": 2}), (TrainValidationSplit, TrainValidationSplitModel, {})],
)
def test_the_best_model_of_a_search_is_saved_and_loaded(stages, frame, tmp_path, search, loader, ratio):
    estimator = stages[1]
    grid = ParamGridBuilder().addGrid(estimator.learning_rate, [0.001, 0.1]).build()
    tuned = search(
        estimator=Pipeline(stages=list(stages)),
        estimatorParamMaps=grid,
        evaluator=MulticlassClassificationEvaluator(metricName="logLoss"),
        seed=0,
        **ratio,
    ).fit(frame)
    path = (tmp_path / "search").as_uri()
    tuned.save(path)
    again = loader.load(path)
    assert scores(again, frame) == scores(tuned, frame)
    assert getattr(again, "avgMetrics", None) == getattr(tuned, "avgMetrics", None)
    assert getattr(again, "validationMetrics", None) == getattr(tuned, "validationMetrics", None)
