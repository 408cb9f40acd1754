# Databricks notebook source
# MAGIC %md
# MAGIC # A network as the last stage of a Spark ML pipeline
# MAGIC A catalog table goes through Imputer, StringIndexer, OneHotEncoder, VectorAssembler and StandardScaler into a network;
# MAGIC the learning rate is searched over by cross-validation; the whole pipeline is saved and loaded as one.

# COMMAND ----------

# MAGIC %pip install "../..[digits]"

# COMMAND ----------

from functools import partial

import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import Imputer, OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from sklearn.datasets import load_diabetes
from torch import nn

from sparkdeep import TorchEstimator, register

table = load_diabetes(scaled=False)  # data (442, 10), target (442,) in 25..346
names = [str(name) for name in table.feature_names]
rows = [(*values, target) for values, target in zip(table.data.tolist(), table.target.tolist(), strict=True)]
raw = spark.createDataFrame(rows, ", ".join(f"{name} double" for name in [*names, "progression"]))
patients = raw.selectExpr("* EXCEPT (sex, bmi)", "if(sex = 1, 'a', 'b') AS sex", "if(age < 25, null, bmi) AS bmi")
patients.write.mode("overwrite").saveAsTable("sparkdeep_patients")
train, test = spark.table("sparkdeep_patients").randomSplit([0.8, 0.2], seed=1)
display(test.limit(5))

# COMMAND ----------


@register
class Progression(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, features):
        return 150 + 75 * self.layers(features).squeeze(1)


numbers = [name for name in names if name != "sex"]
filled = [f"{name}_filled" for name in numbers]
network = TorchEstimator(
    model=Progression,
    model_args={"width": len(numbers) + 1},
    loss=nn.MSELoss(),
    optimizer=partial(torch.optim.AdamW, weight_decay=0.1),
    learning_rate=3e-3,
    featuresCol="features",
    labelCol="progression",
    num_workers=2,
    batch_size=16,
    epochs=10,
    seed=0,
    progress=False,
)
pipeline = Pipeline(
    stages=[
        Imputer(inputCols=numbers, outputCols=filled),
        StringIndexer(inputCol="sex", outputCol="sex_code"),
        OneHotEncoder(inputCol="sex_code", outputCol="sex_hot"),
        VectorAssembler(inputCols=filled, outputCol="numbers"),
        StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
        VectorAssembler(inputCols=["scaled", "sex_hot"], outputCol="features"),
        network,
    ]
)
print(network.explainParam("learning_rate"))

# COMMAND ----------

# MAGIC %md
# MAGIC Every argument of the estimator is a param that a grid can name. Fits take their slots one after another, or side by
# MAGIC side where there are enough: `parallelism` above 1 is safe.

# COMMAND ----------

rmse = RegressionEvaluator(labelCol="progression", metricName="rmse")
search = CrossValidator(
    estimator=pipeline,
    estimatorParamMaps=ParamGridBuilder().addGrid(network.learning_rate, [1e-4, 1e-2]).build(),
    evaluator=rmse,
    numFolds=2,
    seed=0,
)
found = search.fit(train)
for params, score in zip(search.getEstimatorParamMaps(), found.avgMetrics, strict=True):
    print({param.name: value for param, value in params.items()}, f"rmse {score:.1f}")

# COMMAND ----------

best = found.bestModel
best.write().overwrite().save("runs/notebooks/progression")
again = PipelineModel.load("runs/notebooks/progression")
expected = best.transform(test).select("prediction").collect()
same = again.transform(test).select("prediction").collect() == expected
print(f"the loaded pipeline predicts the same: {same}")
score = rmse.evaluate(again.transform(test))
print(f"rmse of the held-out rows {score:.1f}")

# COMMAND ----------

spark.sql("DROP TABLE sparkdeep_patients")
