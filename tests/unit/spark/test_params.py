"""The estimator's settings as Spark ML params: spellings, copies, grids, refusals. No JVM."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from pyspark.ml.param import Param
from pyspark.ml.tuning import ParamGridBuilder
from torch import nn

from sparkdeep import EarlyStopping, TorchEstimator
from sparkdeep.errors import ConfigError
from sparkdeep.spark.model.params import ESTIMATOR_PARAMS

SGD = partial(torch.optim.SGD, lr=0.1)


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(2, width)

    def forward(self, x):
        return self.linear(x)


def estimator(**options):
    settings = {"model": Net, "loss": nn.MSELoss(), "optimizer": SGD, "feature_cols": ["x"], "label_cols": "y"}
    return TorchEstimator(**{**settings, **options})


def test_every_setting_is_a_param_with_a_meaning_and_a_getter_and_a_setter():
    made = estimator()
    assert {param.name for param in made.params} == set(ESTIMATOR_PARAMS)
    for name in ESTIMATOR_PARAMS:
        title = "".join(word.capitalize() for word in name.split("_"))
        assert getattr(made, name).doc
        assert callable(getattr(made, f"get{title}"))
        assert callable(getattr(made, f"set{title}"))
    explained = made.explainParams()
    assert "sync_every: local steps between averages, or 'epoch' (default: 10)" in explained
    assert "batchSize" not in explained


def test_defaults_are_those_of_the_settings():
    made = estimator()
    settings = made.settings()
    for name in ("epochs", "sync_every", "num_workers", "max_stage_s"):
        assert made.getOrDefault(name) == getattr(settings.run, name)
    for name in ("batch_size", "inner_state", "seed", "device"):
        assert made.getOrDefault(name) == getattr(settings.local, name)
    assert not made.isSet(made.epochs)


@pytest.mark.parametrize(
    ("spelling", "name", "value"),
    [
        ("batchSize", "batch_size", 7),
        ("labelCol", "label_cols", "z"),
        ("label_col", "label_cols", "z"),
        ("featuresCol", "feature_cols", "f"),
        ("features_col", "feature_cols", "f"),
        ("predictionCol", "prediction_col", "p"),
        ("weightCol", "weight_col", "w"),
        ("probabilityCol", "probability_col", "p"),
        ("syncEvery", "sync_every", "epoch"),
        ("lr", "learning_rate", 0.5),
        ("maxStageS", "max_stage_s", 3.0),
    ],
)
def test_other_spellings_name_the_same_param(spelling, name, value):
    kept = {key: one for key, one in {"feature_cols": ["x"], "label_cols": "y"}.items() if key != name}
    given = {"model": Net, "loss": nn.MSELoss(), "optimizer": SGD, **kept, spelling: value}
    made = TorchEstimator(**given)
    assert made.getOrDefault(name) == value
    assert getattr(made, spelling) is getattr(made, name)
    assert isinstance(getattr(made, spelling), Param)
    with pytest.raises(ConfigError, match=f"{name} is given twice"):
        TorchEstimator(**given, **{name: value})


def test_the_setters_that_every_estimator_of_spark_has():
    made = estimator().setFeaturesCol("f").setLabelCol("l").setPredictionCol("p").setWeightCol("w")
    assert (made.getFeaturesCol(), made.getLabelCol(), made.getPredictionCol()) == ("f", "l", "p")
    assert made.getFeatureCols() == "f"


def test_setters_return_the_estimator_and_reach_the_settings():
    made = estimator().setEpochs(4).setBatchSize(8).setLabelCols(["a", "b"])
    assert made.getEpochs() == 4
    assert made.getModel() is Net
    settings = made.settings()
    assert (settings.run.epochs, settings.local.batch_size, settings.label_cols) == (4, 8, ["a", "b"])
    made.clear(made.epochs)
    assert made.settings().run.epochs == 1


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"'lerning_rate'.*Did you mean 'learning_rate'"):
        estimator(lerning_rate=0.1)
    made = estimator()
    with pytest.raises(
        AttributeError, match=r"TorchEstimator has no attribute 'lerning_rate'. Did you mean 'learning_rate'"
    ):
        _ = made.lerning_rate
    with pytest.raises(AttributeError, match=r"'setBatchsize'. Did you mean 'setBatchSize'"):
        made.setBatchsize(3)
    assert not hasattr(made, "__wrapped__")


@pytest.mark.parametrize(
    ("name", "setter"), [("epochs", "setEpochs"), ("batchSize", "setBatchSize"), ("lr", "setLearningRate")]
)
def test_a_value_assigned_to_a_param_is_refused_as_it_would_set_nothing(name, setter):
    made = estimator()
    with pytest.raises(AttributeError, match=f"{name} is a Spark ML Param.*{setter}"):
        setattr(made, name, 3)
    made.note = "other attributes are the user's"
    assert made.note.startswith("other")


def test_a_copy_is_its_own_and_takes_a_param_map():
    made = estimator(epochs=2)
    other = made.copy({made.epochs: 5, made.sync_every: "epoch"})
    assert (made.getEpochs(), other.getEpochs(), other.getSyncEvery()) == (2, 5, "epoch")
    assert other.uid == made.uid
    other.setBatchSize(3)
    assert made.getBatchSize() == 32


def test_numbers_of_numpy_are_plain_ones_inside():
    made = estimator(epochs=np.int64(3), learning_rate=np.float64(0.25), batch_size=np.int32(8))
    assert type(made.getEpochs()) is int
    assert type(made.getLearningRate()) is float
    grid = ParamGridBuilder().addGrid(made.epochs, np.arange(1, 3)).addGrid(made.lr, np.geomspace(0.1, 1, 2)).build()
    found = [made.copy(one).settings() for one in grid]
    assert sorted((s.run.epochs, s.optimizer.keywords["lr"]) for s in found) == [(1, 0.1), (1, 1.0), (2, 0.1), (2, 1.0)]


def test_the_learning_rate_replaces_that_of_the_optimizer():
    parameter = [nn.Parameter(torch.zeros(1))]
    kept = estimator(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    for made, rate in ((kept, 0.1), (kept.copy({kept.learning_rate: 0.5}), 0.5)):
        [group] = made.settings().optimizer(parameter).param_groups
        assert (group["lr"], group["momentum"]) == (rate, 0.9)
    [group] = estimator(optimizer=torch.optim.SGD, lr=0.3).settings().optimizer(parameter).param_groups
    assert group["lr"] == 0.3


def test_a_patience_is_an_early_stopping():
    rule = estimator(validation=0.1, early_stopping=4).settings().run.early_stopping
    assert rule == EarlyStopping(patience=4)


class Frame:
    """Stands where a DataFrame would; a fit that reaches it has trained."""

    @property
    def sparkSession(self):
        raise AssertionError("a model was trained")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda made: {made.epochs: 0}, "epochs=0: must be a whole number of at least 1"),
        (lambda made: {made.learning_rate: -1.0}, "learning_rate=-1.0"),
        (lambda made: {made.learning_rate: "high"}, "learning_rate='high'"),
        (lambda made: {made.prediction_col: "x"}, "prediction_col='x' is a column that training reads"),
        (lambda made: {"epochs": 2}, "has the key 'epochs'.*estimator.epochs"),
        (lambda made: {Param(made, "epoch", ""): 2}, "unknown param.*'epoch'. Did you mean 'epochs'"),
        (lambda made: {estimator().epochs: 2}, "of TorchEstimator_.*and this is TorchEstimator_"),
    ],
    ids=["epochs", "rate", "type", "column", "key", "unknown", "other"],
)
def test_a_grid_is_refused_before_its_first_model_trains(bad, message):
    made = estimator()
    grid = [{made.epochs: 1}, bad(made)]
    with pytest.raises(ConfigError, match=message):
        made.fitMultiple(Frame(), grid)
    with pytest.raises(ConfigError, match=message):
        made.fit(Frame(), grid)
    with pytest.raises(ConfigError, match=message):
        made.fit(Frame(), bad(made))
    with pytest.raises(AssertionError, match="trained"):  # the same call without the fault
        made.fit(Frame(), grid[:1])


def test_only_fits_that_are_one_of_several_keep_their_checkpoints_apart():
    made = estimator()
    assert not made._search
    assert not made.copy()._search
    assert made.copy({})._search  # as Pipeline.copy does for an empty grid
    assert made.copy({made.epochs: 3})._search
    assert made.copy({made.epochs: 3}).copy()._search
