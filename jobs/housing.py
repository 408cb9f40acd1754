"""House prices through a whole Spark ML pipeline, cross-validated, saved, loaded, and compared with two plain models.

spark-submit jobs/housing.py [--data DIR] [--output runs/housing] [--folds 2] [--epochs 20]

DIR holds housing.csv (California, 1990); without it, the same code runs on the patients that scikit-learn brings. Every
number is the root of the mean squared error on a fifth of the rows that no model has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from houses import Regressor, Table, diabetes, houses, in_units
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import SQLTransformer
from pyspark.ml.functions import vector_to_array
from pyspark.ml.regression import LinearRegression
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from tabular import feature_pipeline
from torch import nn

from sparkdeep import TorchEstimator

LOGARITHM = "log_target"
SEED = 1


def pipeline(table: Table, mean: float, epochs: int) -> Pipeline:
    """Derived columns, then gaps, categories and scales, then the network."""
    made = ", ".join(f"{expression} AS {name}" for name, expression in table.derived.items())
    derive = SQLTransformer(statement=f"SELECT *, {made} FROM __THIS__")  # noqa: S608 (the expressions are ours)
    features = feature_pipeline(numeric=(*table.numeric, *table.derived), categorical=table.categorical)
    network = TorchEstimator(
        model=Regressor,
        model_args={"mean": mean},
        loss=nn.SmoothL1Loss(beta=0.3),
        optimizer=partial(torch.optim.AdamW, weight_decay=1e-4),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.999),
        featuresCol="features",
        labelCol=LOGARITHM,
        prediction=in_units,
        batch_size=64,
        epochs=epochs,
        num_workers=2,
        seed=0,
        progress=False,
    )
    return Pipeline(stages=[derive, *features.getStages(), network])


def search(table: Table, train: DataFrame, *, folds: int, epochs: int) -> CrossValidatorModel:
    """Cross-validate over learning rates, rounds and passes; the best is fitted on all of `train`."""
    stages = pipeline(table, float(train.agg(F.avg(LOGARITHM)).first()[0]), epochs)
    network = stages.getStages()[-1]
    grid = ParamGridBuilder().addGrid(network.learning_rate, [1e-3, 1e-2]).addGrid(network.sync_every, [10, "epoch"])
    short = ParamGridBuilder().addGrid(network.learning_rate, [1e-2]).addGrid(network.epochs, [max(1, epochs // 4)])
    return CrossValidator(
        estimator=stages,
        estimatorParamMaps=[*grid.build(), *short.build()],
        evaluator=RegressionEvaluator(labelCol=table.target),
        numFolds=folds,
        seed=SEED,
    ).fit(train)


def linear_rmse(table: Table, train: DataFrame, test: DataFrame) -> float:
    """Spark's linear regression on the same features."""
    fitted = LinearRegression(featuresCol="features", labelCol=table.target).fit(train)
    return float(RegressionEvaluator(labelCol=table.target).evaluate(fitted.transform(test)))


def plain_rmse(table: Table, train: DataFrame, test: DataFrame) -> float:
    """A perceptron of two layers in this process, on the same features and the scaled target."""

    def tensors(rows: DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
        found = rows.select(vector_to_array("features").alias("x"), F.col(table.target).alias("y")).collect()
        return torch.tensor([row.x for row in found]), torch.tensor([row.y for row in found])

    (x, y), (test_x, test_y) = tensors(train), tensors(test)  # (rows, features), (rows,) float32
    mean, scale = y.mean(), y.std()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(20):
        for batch in torch.split(torch.randperm(len(x)), 128):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x[batch]).squeeze(1), (y[batch] - mean) / scale)
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        return math.sqrt(nn.functional.mse_loss(net(test_x).squeeze(1) * scale + mean, test_y))


def predictions(model: Any, rows: DataFrame) -> list[float]:
    """What a model writes, in the order of the rows' values."""
    scored = model.transform(rows)
    return [row[0] for row in scored.orderBy(*rows.columns).select("prediction").collect()]


def run(spark: SparkSession, *, data: str | None, output: str, folds: int, epochs: int) -> dict[str, Any]:
    """The whole example; returns and prints its numbers."""
    table = houses(spark, data) if data else diabetes(spark)
    rows = table.rows.withColumn(LOGARITHM, F.ln(table.target))
    train, test = (part.cache() for part in rows.randomSplit([0.8, 0.2], seed=SEED))
    found = search(table, train, folds=folds, epochs=epochs)
    found.write().overwrite().save(f"{output}/search")
    again = CrossValidatorModel.load(f"{output}/search")
    own, loaded = predictions(found.bestModel, test), predictions(again.bestModel, test)

    features = again.bestModel.copy()
    features.stages = features.stages[:-1]
    seen, unseen = (features.transform(part).cache() for part in (train, test))
    network = found.bestModel.stages[-1]
    result = {
        "rows": train.count(),
        "unit": table.unit,
        "network": float(RegressionEvaluator(labelCol=table.target).evaluate(found.bestModel.transform(test))),
        "linear regression": linear_rmse(table, seen, unseen),
        "plain perceptron": plain_rmse(table, seen, unseen),
        "cross-validation": [
            {**{param.name: value for param, value in settings.items()}, "rmse": metric}
            for settings, metric in zip(found.getEstimatorParamMaps(), found.avgMetrics, strict=True)
        ],
        "rounds": len(network.history),
        "same after loading": own == loaded,
    }
    Path(output).mkdir(parents=True, exist_ok=True)
    Path(output, "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for one in result["cross-validation"]:
        print(f"cross-validated {json.dumps(one)}")
    for name in ("network", "linear regression", "plain perceptron"):
        print(f"rmse {name}: {result[name]:,.1f} {table.unit}")
    print(f"same predictions after loading: {result['same after loading']}")
    return result


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with housing.csv")
    parser.add_argument("--output", default="runs/housing")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spark = SparkSession.builder.config("spark.sql.shuffle.partitions", "4").getOrCreate()
    try:
        run(spark, data=given.data, output=given.output, folds=given.folds, epochs=given.epochs)
    finally:
        spark.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
