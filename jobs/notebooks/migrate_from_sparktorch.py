# Databricks notebook source
# MAGIC %md
# MAGIC # From SparkTorch
# MAGIC No serialized torch object: the network, the loss and the optimizer are arguments of the estimator. Every replica starts
# MAGIC from the same parameters, and they are averaged by rows every `sync_every` steps.
# MAGIC
# MAGIC | `sparktorch.SparkTorch` | `sparkdeep.TorchEstimator` |
# MAGIC |---|---|
# MAGIC | `inputCol` | `feature_cols` (or `featuresCol`) |
# MAGIC | `labelCol` | `label_cols` (or `labelCol`); integers stay integers, as cross-entropy wants them |
# MAGIC | `torchObj` | `model`, `loss`, `optimizer` |
# MAGIC | `iters` | `epochs`: passes over all rows |
# MAGIC | `predictionCol` | `prediction_col` (or `predictionCol`) |
# MAGIC | `partitions` | `num_workers` |
# MAGIC | `acquireLock` | none: replicas do not write to each other |
# MAGIC | `verbose` | `progress`; what replicas print is shown with their number |
# MAGIC | `partitionShuffles` | none: rows are dealt by a hash, and drawn in a new order each epoch |
# MAGIC | `port` | `coordinator_port`: a port or a range; any free one by default |
# MAGIC | `useBarrier` | always |
# MAGIC | `useVectorOut` | `probability_col`, `raw_prediction_col`: Spark ML vectors |
# MAGIC | `earlyStopPatience` | `early_stopping`, on validation rows; the best round's parameters are kept |
# MAGIC | `miniBatch` | `batch_size` |
# MAGIC | `validationPct` | `validation` |
# MAGIC | `mode` | rounds of local steps; `sync_every=1` averages after every step |
# MAGIC | `device` | `device="auto"`: the GPU that Spark gave the task |
# MAGIC | `compileMode` | `model=lambda: torch.compile(Net())` |
# MAGIC
# MAGIC A saved pipeline loads with `PipelineModel.load`; nothing has to be unwrapped.

# COMMAND ----------

# MAGIC %pip install ../..

# COMMAND ----------

# MAGIC %md
# MAGIC With SparkTorch:
# MAGIC
# MAGIC     torch_obj = serialize_torch_obj(model=net, criterion=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam, lr=0.01)
# MAGIC     stage = SparkTorch(inputCol="features", labelCol="label", predictionCol="predictions", torchObj=torch_obj, iters=50,
# MAGIC                        partitions=2, miniBatch=32, validationPct=0.2, earlyStopPatience=5, verbose=1)
# MAGIC     model = Pipeline(stages=[assembler, stage]).fit(df)

# COMMAND ----------

from functools import partial

import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler
from torch import nn

from sparkdeep import TorchEstimator, register

df = spark.range(600).selectExpr("cos(id) AS x", "sin(id) AS y", "bigint(cos(id) * sin(id) > 0) AS label")
assembler = VectorAssembler(inputCols=["x", "y"], outputCol="features")


@register
def net():
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))


stage = TorchEstimator(
    featuresCol="features", labelCol="label", predictionCol="predictions", model=net, loss=nn.CrossEntropyLoss(),
    optimizer=partial(torch.optim.Adam, lr=0.01), epochs=30, num_workers=2, batch_size=32, validation=0.2,
    early_stopping=5, prediction="argmax", seed=0, progress=False,
)  # fmt: skip
model = Pipeline(stages=[assembler, stage]).fit(df)

# COMMAND ----------

model.write().overwrite().save("runs/notebooks/quadrants")
again = PipelineModel.load("runs/notebooks/quadrants")
right = again.transform(df).selectExpr("avg(double(predictions = label))").first()[0]
print(f"{right:.1%} of the rows are told right")
