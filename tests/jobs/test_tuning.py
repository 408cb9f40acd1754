"""Searches over the estimator: grids, folds, threads on the same slots, what is saved, and where checkpoints lie."""

from __future__ import annotations

import json
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator, RegressionEvaluator
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

from sparkdeep import TorchEstimator, register
from sparkdeep.errors import ConfigError, ModelLoadError, PreflightError

pytestmark = pytest.mark.jobs

TOGETHER_S = 120.0


@register
class Line(nn.Module):
    """y = x w + b."""

    def __init__(self, inputs=2, bias=True):
        super().__init__()
        self.linear = nn.Linear(inputs, 1, bias=bias)

    def forward(self, x):
        return self.linear(x).squeeze(1)


@register
def slowly(x):
    time.sleep(0.02)
    return x


def line(**options):
    settings = {
        "model": Line,
        "loss": nn.MSELoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
        "feature_cols": ["a", "b"],
        "label_cols": "y",
        "num_workers": 2,
        "batch_size": 20,
        "epochs": 2,
        "sync_every": 2,
        "seed": 0,
        "progress": False,
        **options,
    }
    return TorchEstimator(**settings)


@pytest.fixture(scope="module")
def rows(spark):
    made = [(a, b, 2.0 * a - b + 1.0) for a, b in np.random.default_rng(0).normal(size=(200, 2)).tolist()]
    return spark.createDataFrame(made, "a double, b double, y double").cache()


class Killed(Exception):
    pass


def rmse():
    return RegressionEvaluator(labelCol="y")  # Spark's evaluators need a session to be made


def weights(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def values(frame):
    return [row[0] for row in frame.orderBy("a").select("prediction").collect()]


def test_a_grid_reaches_learning_rate_epochs_rounds_and_the_model(rows):
    made = line()
    grid = [
        {},
        {made.learning_rate: np.float64(0.5)},
        {made.epochs: np.int64(4)},
        {made.sync_every: "epoch"},
        {made.model_args: {"bias": False}},
    ]
    plain, faster, longer, rarer, bare = made.fit(rows, grid)
    assert [len(one.history) for one in (plain, faster, longer, rarer)] == [6, 6, 12, 2]
    assert faster.history[-1].loss < plain.history[-1].loss
    assert longer.history[-1].loss < plain.history[-1].loss
    assert "linear.bias" not in weights(bare)
    # What a grid sets is what a setter sets; the estimator itself is as it was.
    assert same_bits(weights(longer), weights(line(epochs=4).fit(rows)))
    assert same_bits(weights(made.fit(rows)), weights(plain))
    warm, colder = made.fit(rows, [{}, {made.epochs: 1}], warm_start=longer)
    assert warm.history[0].loss < plain.history[0].loss
    assert (len(warm.history), len(colder.history)) == (6, 3)


def test_a_cross_validated_pipeline_is_saved_and_loaded_and_predicts_the_same_bits(rows, tmp_path):
    made = line(feature_cols="v", label_cols="y")
    stages = Pipeline(stages=[VectorAssembler(inputCols=["a", "b"], outputCol="v"), made])
    grid = ParamGridBuilder().addGrid(made.learning_rate, [1e-4, 0.2]).build()
    search = CrossValidator(estimator=stages, estimatorParamMaps=grid, evaluator=rmse(), numFolds=2, seed=1)
    search.save(str(tmp_path / "search"))
    found = search.fit(rows)
    assert found.avgMetrics[1] < found.avgMetrics[0] / 2
    assert found.bestModel.stages[-1].history[-1].loss < 0.1
    found.save(str(tmp_path / "found"))
    again = CrossValidatorModel.load(str(tmp_path / "found"))
    assert values(again.transform(rows)) == values(found.transform(rows))
    assert values(PipelineModel.load(str(tmp_path / "found" / "bestModel")).transform(rows)) == values(
        found.transform(rows)
    )
    # The search itself, loaded, trains the same models.
    loaded = CrossValidator.load(str(tmp_path / "search"))
    pipeline = loaded.getEstimator()
    assert pipeline.getStages()[-1].uid == made.uid
    assert [list(one.values()) for one in loaded.getEstimatorParamMaps()] == [[1e-4], [0.2]]
    refitted = pipeline.fit(rows, loaded.getEstimatorParamMaps()[1])
    assert values(refitted.transform(rows)) == values(found.transform(rows))


def test_a_train_validation_split_of_a_classifier_with_sparks_own_evaluator(spark, tmp_path):
    made = [(x, int(x > 0)) for x in np.random.default_rng(1).normal(size=200).tolist()]
    rows = spark.createDataFrame(made, "a double, label long")
    estimator = line(
        model=partial(nn.Linear, 1, 2),
        loss=nn.CrossEntropyLoss(),
        feature_cols=["a"],
        label_cols="label",
        probability_col="probability",
        raw_prediction_col="rawPrediction",
        prediction="argmax",
        epochs=10,
    )
    search = TrainValidationSplit(
        estimator=estimator,
        estimatorParamMaps=ParamGridBuilder().addGrid(estimator.lr, [0.0, 0.5]).build(),
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        trainRatio=0.75,
        seed=0,
    )
    found = search.fit(rows)
    assert found.validationMetrics[1] >= 0.9
    assert found.validationMetrics[1] > found.validationMetrics[0]
    found.save(str(tmp_path / "found"))
    again = TrainValidationSplitModel.load(str(tmp_path / "found"))
    columns = ["prediction", "probability", "rawPrediction"]
    assert (
        again.transform(rows).select(*columns).collect() == found.bestModel.transform(rows).select(*columns).collect()
    )


def test_an_estimator_comes_back_with_its_settings_and_a_module_with_its_tensors(rows, tmp_path):
    own = Line()
    with torch.no_grad():
        own.linear.weight.fill_(0.125)
    made = line(
        model=own, optimizer=partial(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.9)), early_stopping=3, validation=0.2
    )
    made.setPreprocess(slowly)
    path = str(tmp_path / "estimator")
    made.save(path)
    again = TorchEstimator.load(path)
    assert again.uid == made.uid
    assert again.getOptimizer().keywords == {"lr": 0.1, "betas": (0.8, 0.9)}
    assert again.getPreprocess() is slowly
    assert again.getEarlyStopping() == 3
    assert again.getModel().linear.weight.tolist() == [[0.125, 0.125]]
    assert {p.name for p in again.params if again.isSet(p)} == {p.name for p in made.params if made.isSet(p)}
    assert same_bits(weights(again.fit(rows)), weights(made.fit(rows)))
    with pytest.raises(Exception, match=r"(?i)already exists"):
        made.save(path)
    made.setEpochs(7).write().overwrite().save(path)
    assert TorchEstimator.load(path).getEpochs() == 7


def test_what_cannot_be_saved_is_refused_by_name_before_anything_is_overwritten(rows, tmp_path):
    path = str(tmp_path / "pipeline")
    good = Pipeline(stages=[line()])
    good.save(path)
    for options, part in (
        ({"loss": lambda output, y: (output - y).abs().mean()}, "loss"),
        ({"validation": rows}, "validation is of class DataFrame"),
        ({"callbacks": [print]}, r"callbacks\[0\]"),
        ({"model": nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))}, "model is a Sequential"),
    ):
        with pytest.raises(ConfigError, match=part):
            line(**options).write().overwrite().save(f"{path}/stages/0_x")
        with pytest.raises(ConfigError, match=part):
            line(**options).save(str(tmp_path / "other"))
        assert not (tmp_path / "other").exists()
    assert Pipeline.load(path).getStages()[0].getEpochs() == 2


def test_a_stored_estimator_names_nothing_outside_the_rules(spark, tmp_path):
    path = tmp_path / "estimator"
    line().save(str(path))
    [part] = (path / "metadata").glob("part-*")
    stored = json.loads(part.read_text())
    touched = tmp_path / "touched"
    stored["paramMap"]["model"] = {"partial": "os:system", "args": [f"touch {touched}"], "kwargs": {}}
    for crc in (path / "metadata").glob(".*.crc"):
        crc.unlink()
    part.write_text(json.dumps(stored))
    with pytest.raises(ModelLoadError, match=r"model.*'os:system' is refused"):
        TorchEstimator.load(str(path))
    assert not touched.exists()
    stored["sparkdeep"]["format_version"] = 99
    part.write_text(json.dumps(stored))
    with pytest.raises(ModelLoadError, match="format 99"):
        TorchEstimator.load(str(path))


def test_two_models_at_a_time_on_slots_for_one_end_and_equal_those_one_at_a_time(rows):
    made = line(preprocess=slowly, epochs=3)
    grid = ParamGridBuilder().addGrid(made.learning_rate, [0.01, 0.1]).build()

    def search(parallelism):
        began = time.monotonic()
        found = TrainValidationSplit(
            estimator=made, estimatorParamMaps=grid, evaluator=rmse(), seed=1, parallelism=parallelism
        ).fit(rows)
        return found, time.monotonic() - began

    serial, serial_s = search(1)
    threaded, threaded_s = search(2)
    print(f"serial {serial_s:.1f} s, parallelism=2 {threaded_s:.1f} s")
    assert threaded.validationMetrics == serial.validationMetrics
    assert same_bits(weights(threaded.bestModel), weights(serial.bestModel))
    assert threaded_s < TOGETHER_S


def test_other_jobs_get_through_while_a_stage_would_stay_open_for_the_whole_fit(rows):
    waits, fitted = [], []
    made = line(epochs=120, sync_every=5, preprocess=slowly, rounds_per_stage=1000, max_stage_s=600.0)
    began = time.monotonic()
    thread = threading.Thread(target=lambda: fitted.append(made.fit(rows)))
    thread.start()
    while thread.is_alive():
        asked = time.monotonic()
        assert rows.groupBy((F.col("a") > 0).alias("p")).count().count() == 2
        waits.append(time.monotonic() - asked)
        thread.join(0.5)
    fit_s = time.monotonic() - began
    [model] = fitted
    stages = sum(record.stage_seconds > 0 for record in model.history)
    print(f"{len(waits)} queries, longest {max(waits):.1f} s; fit {fit_s:.1f} s, {stages} stages")
    assert model.history[-1].epoch == 120
    assert stages > 1
    assert max(waits) < 0.8 * fit_s


def test_a_fit_in_a_callback_needs_the_stage_closed(rows):
    inner = []

    class Inside:
        __name__ = "inside"

        def __init__(self, needs_spark):
            self.needs_spark = needs_spark

        def __call__(self, record):
            if record.round == 1:
                inner.append(line(epochs=1).fit(rows))

    line(callbacks=[Inside(True)]).fit(rows)
    assert same_bits(weights(inner[0]), weights(line(epochs=1).fit(rows)))
    with pytest.raises(PreflightError, match=r"callback.*needs_spark = True"):
        line(callbacks=[Inside(False)]).fit(rows)
    assert len(inner) == 1


def test_models_of_a_search_keep_their_checkpoints_apart_and_a_killed_search_goes_on(rows, tmp_path):
    folder = tmp_path / "run"
    trained, killed_at = [], []

    def note(record):
        trained.append(record.round)
        if len(trained) in killed_at:
            raise Killed

    def search(**options):
        made = line(callbacks=[note], **options)
        grid = [{made.epochs: 2}, {made.epochs: 1}, {made.model_args: {"bias": False}}]
        trained.clear()
        return CrossValidator(
            estimator=Pipeline(stages=[made]), estimatorParamMaps=grid, evaluator=rmse(), numFolds=2, seed=1
        ).fit(rows)

    plain = search()
    whole = len(trained)
    killed_at.append(trained.index(1, trained.index(1, 1) + 1) + 1)  # in the first round of the third model
    with pytest.raises(Killed):
        search(checkpoint_dir=str(folder), checkpoint_every=1)
    [done] = killed_at
    killed_at.clear()
    found = search(checkpoint_dir=str(folder), checkpoint_every=1)
    assert whole - done <= len(trained) <= whole - done + 1  # the first two models are not trained again
    assert len(list((folder / "search").iterdir())) == 2 * 3 + 1
    assert found.avgMetrics == plain.avgMetrics  # what no checkpoint could have touched
    assert same_bits(weights(found.bestModel.stages[-1]), weights(plain.bestModel.stages[-1]))
    line(checkpoint_dir=str(folder)).fit(rows)
    assert (folder / "commits").is_dir()  # a fit by itself keeps to the folder
