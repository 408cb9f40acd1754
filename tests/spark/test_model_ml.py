"""`TorchModel` among Spark ML's own: evaluators, param maps, SQL. Nothing is trained."""

from __future__ import annotations

import re

import pytest
import torch
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import functions as F
from spark_models import Affine, Net, TwoTowers, estimator
from torch import nn

from sparkdeep import TorchModel
from sparkdeep.data.schema import build_schema
from sparkdeep.errors import ConfigError
from sparkdeep.models.registry import reference_of
from sparkdeep.spark.session.types import column_types

pytestmark = pytest.mark.spark


def model_for(frame, module, feature_cols, **options):
    """A model as a fit on `frame` would give it, with the parameters that `module` has."""
    columns = column_types(frame.schema, [])
    schema = build_schema(types=columns, feature_cols=feature_cols, label_cols=None, weight_col=None)
    if isinstance(feature_cols, str):
        schema = schema.with_seen({"features": ("float32", (8,))})
    return TorchModel(module=module.eval(), schema=schema, reference=reference_of(module, None), **options)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def classifier(blobs, net):
    return model_for(blobs, net, "pixels", probability_col="probability", raw_prediction_col="rawPrediction")


def outputs(model, rows):
    with torch.inference_mode():
        return model.model(torch.tensor([row["pixels"] for row in rows]))


def plan_of(frame):
    return frame._jdf.queryExecution().executedPlan().toString()


def test_a_classifiers_columns_are_spark_mls_and_hold_torchs_numbers(classifier, blobs):
    scored = classifier.transform(blobs.coalesce(1))
    kinds = {field.name: field.dataType for field in scored.schema.fields}
    assert kinds["prediction"].simpleString() == "double"
    assert kinds["probability"] == kinds["rawPrediction"] == VectorUDT()
    assert scored.columns == [*blobs.columns, "prediction", "probability", "rawPrediction"]
    rows = scored.collect()
    logits = outputs(classifier, rows)
    assert torch.equal(torch.tensor([list(row["rawPrediction"]) for row in rows], dtype=torch.float64), logits.double())
    assert torch.equal(
        torch.tensor([list(row["probability"]) for row in rows], dtype=torch.float64), logits.softmax(1).double()
    )
    assert [row["prediction"] for row in rows] == logits.argmax(1).double().tolist()


def test_the_network_runs_once_for_all_columns(classifier, blobs):
    scored = classifier.transform(blobs)
    for frame in (scored, scored.select("probability", "prediction"), scored.select(F.sum("prediction"))):
        assert len(re.findall(r"ArrowEvalPython \[", plan_of(frame))) == 1
        assert len(set(re.findall(r"pythonUDF\d+#\d+", plan_of(frame)))) == 1
    assert "ArrowEvalPython" not in plan_of(scored.select("id"))


def test_sparks_evaluators_read_a_classifier_as_it_is(classifier, blobs):
    scored = classifier.transform(blobs)
    rows = scored.collect()
    labels = torch.tensor([row["label"] for row in rows])
    logits = outputs(classifier, rows)
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(scored)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    loss = MulticlassClassificationEvaluator(metricName="logLoss").evaluate(scored)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits.double(), labels)), rel=1e-5)


def test_one_logit_is_read_by_the_binary_evaluator(spark, blobs):
    frame = blobs.withColumn("label", (F.col("label") == 1).cast("double"))
    torch.manual_seed(1)
    model = model_for(frame, Affine(8), "pixels", probability_col="probability", raw_prediction_col="rawPrediction")
    scored = model.transform(frame)
    rows = scored.collect()
    z = outputs(model, rows).reshape(-1).double()
    positive = torch.tensor([row["label"] for row in rows]) == 1
    wins = (z[positive][:, None] > z[~positive]).double() + (z[positive][:, None] == z[~positive]).double() / 2
    area = BinaryClassificationEvaluator().evaluate(scored)
    assert area == pytest.approx(float(wins.mean()), abs=1e-9)
    assert all(row["rawPrediction"][0] == -row["rawPrediction"][1] for row in rows)
    assert torch.allclose(torch.tensor([row["probability"][1] for row in rows]), z.sigmoid(), atol=1e-6)
    assert [row["prediction"] for row in rows] == (z > 0).double().tolist()


def test_a_regression_is_read_by_the_regression_evaluator(blobs):
    model = model_for(blobs, Affine(8), "pixels")
    scored = model.transform(blobs)
    rows = scored.collect()
    error = outputs(model, rows).reshape(-1).double() - torch.tensor([row["label"] for row in rows])
    assert RegressionEvaluator().evaluate(scored) == pytest.approx(float(error.square().mean().sqrt()), rel=1e-6)


def test_a_param_map_counts_for_one_time_and_strangers_in_it_are_passed_over(classifier, blobs):
    stranger = estimator().epochs
    other = classifier.transform(
        blobs,
        {classifier.prediction_col: "class", classifier.probability_col: None, classifier.batch_size: 3, stranger: 5},
    )
    assert other.columns == [*blobs.columns, "class", "rawPrediction"]
    assert classifier.getPredictionCol() == "prediction"
    assert [row["class"] for row in other.collect()] == [
        row["prediction"] for row in classifier.transform(blobs).collect()
    ]


def test_a_column_that_is_there_is_not_written_over(classifier, blobs):
    with pytest.raises(
        ConfigError, match=r"column 'Probability' is in the DataFrame already.*choose another probability_col"
    ):
        classifier.transform(blobs.withColumn("Probability", F.lit(1)))


def test_the_features_may_be_read_from_another_column(classifier, blobs):
    renamed = blobs.withColumnRenamed("pixels", "an odd.name")
    first = classifier.transform(blobs).select("rawPrediction").collect()
    assert classifier.setFeaturesCol("an odd.name").transform(renamed).select("rawPrediction").collect() == first


def test_sql_gives_what_transform_gives(spark, blobs, net, classifier):
    blobs.createOrReplaceTempView("blobs")
    plain = model_for(blobs, net, "pixels")
    spark.udf.register("plain", plain.udf())
    assert spark.sql("SELECT plain(pixels) AS prediction FROM blobs").collect() == (
        plain.transform(blobs).select("prediction").collect()
    )
    spark.udf.register("scores", classifier.udf())
    sql = spark.sql("SELECT s.prediction, s.probability, s.raw_prediction FROM (SELECT scores(pixels) AS s FROM blobs)")
    expected = classifier.transform(blobs).select("prediction", "probability", "rawPrediction").collect()
    assert [[row[0], *row[1], *row[2]] for row in sql.collect()] == [[row[0], *row[1], *row[2]] for row in expected]


def test_sql_takes_several_feature_columns_in_their_order(spark):
    frame = spark.range(20).selectExpr("id / 7 AS a", "id % 3 / 2 AS b", "id % 5 AS kind").coalesce(1)
    frame.createOrReplaceTempView("towers")
    torch.manual_seed(2)
    model = model_for(frame, TwoTowers(), {"dense": ["a", "b"], "category": "kind"})
    spark.udf.register("towers", model.udf())
    got = [row[0] for row in spark.sql("SELECT towers(a, b, kind) FROM towers").collect()]
    assert got == [row["prediction"] for row in model.transform(frame).collect()]
    swapped = [row[0] for row in spark.sql("SELECT towers(b, a, kind) FROM towers").collect()]
    assert got != swapped
