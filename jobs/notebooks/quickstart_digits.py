# Databricks notebook source
# MAGIC %md
# MAGIC # Handwritten digits in five cells
# MAGIC A convolutional network learns 1,797 small images with two replicas, and is used from SQL.
# MAGIC
# MAGIC Cluster: *dedicated* access mode with autoscaling off (barrier stages need a fixed number of workers), a Databricks
# MAGIC runtime on Spark 3.5 or 4. `conf/databricks/cluster.json` is one that fits.

# COMMAND ----------

# MAGIC %pip install "../..[digits]"

# COMMAND ----------

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn

from sparkdeep import TorchEstimator, TorchModel, register

images, labels = load_digits(return_X_y=True)  # (1797, 64) in 0..16; (1797,) in 0..9
rows = [(image.tolist(), int(label)) for image, label in zip(images, labels, strict=True)]
digits = spark.createDataFrame(rows, "pixels array<double>, label bigint")
train, test = digits.randomSplit([0.8, 0.2], seed=0)
display(train.groupBy("label").count().orderBy("label"))

# COMMAND ----------

# MAGIC %md
# MAGIC `@register` lets a saved model name this class, which lives in the notebook only.

# COMMAND ----------


@register
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def forward(self, pixels):
        return self.layers(pixels.reshape(-1, 1, 8, 8) / 16)


estimator = TorchEstimator(
    model=Net,
    loss=nn.CrossEntropyLoss(),
    optimizer=partial(torch.optim.SGD, lr=0.1),
    feature_cols="pixels",
    label_cols="label",
    num_workers=2,
    batch_size=32,
    epochs=8,
    validation=0.1,
    probability_col="probability",
    seed=0,
)
model = estimator.fit(train)
print(f"{len(model.history)} rounds, training loss {model.history[-1].loss:.4f}, {model.history[-1].metrics}")

# COMMAND ----------

from pyspark.ml.evaluation import MulticlassClassificationEvaluator

predictions = model.transform(test)
accuracy = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(predictions)
print(f"accuracy {accuracy:.4f}")
display(predictions.select("label", "prediction", "probability").limit(5))

# COMMAND ----------

# MAGIC %md
# MAGIC The model as a file (on Databricks: a folder of a Unity Catalog volume), and as a function of SQL. With
# MAGIC `probability_col` its result has two fields.

# COMMAND ----------

model.write().overwrite().save("runs/notebooks/digits")
again = TorchModel.load("runs/notebooks/digits")
spark.udf.register("predict_digit", again.udf())
test.createOrReplaceTempView("digits_test")
counted = spark.sql(
    "SELECT predict_digit(pixels).prediction AS digit, count(*) AS rows FROM digits_test GROUP BY 1 ORDER BY 1"
)
display(counted)
