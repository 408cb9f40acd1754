# Databricks notebook source
# MAGIC %md
# MAGIC # From TorchDistributor
# MAGIC TorchDistributor starts your training script on the workers and leaves the rest to it: reading the rows, sampling,
# MAGIC DistributedDataParallel, saving. With sparkdeep the script goes; the network, the loss and the optimizer stay.
# MAGIC
# MAGIC | `pyspark.ml.torch.distributor.TorchDistributor` | `sparkdeep.TorchEstimator` |
# MAGIC |---|---|
# MAGIC | `num_processes` | `num_workers` |
# MAGIC | `local_mode` | the session's master: `local[2]`, or a cluster |
# MAGIC | `use_gpu` | `device="auto"`: the GPU that Spark gave the task, else the CPU; fractions are fine |
# MAGIC | `run(train_object)` | `fit(df)`; the body of the loop: `training_step(model, batch) -> loss` |
# MAGIC | `run(*args)` | `model_args`, and arguments of the factories |
# MAGIC
# MAGIC | in the training function | here |
# MAGIC |---|---|
# MAGIC | `DistributedDataParallel(model)` | nothing: parameters are averaged every `sync_every` steps |
# MAGIC | `DistributedSampler`, `DataLoader` | nothing: each replica has its rows on its own disk, in a new order each epoch |
# MAGIC | `dist.init_process_group`, ranks | nothing |
# MAGIC | `lr * world_size` | write the rate you mean; it is never scaled |
# MAGIC | `torch.save` on rank 0 | `model.save(path)`, or `checkpoint_dir` |
# MAGIC
# MAGIC Stay with TorchDistributor for a model that does not fit one GPU (FSDP, DeepSpeed), and for dense training where every
# MAGIC step must be synchronized over a fast network.

# COMMAND ----------

# MAGIC %pip install ../..

# COMMAND ----------

# MAGIC %md
# MAGIC With TorchDistributor:
# MAGIC
# MAGIC     def train(path, lr):
# MAGIC         dist.init_process_group("gloo")
# MAGIC         model = DistributedDataParallel(Net())
# MAGIC         optimizer = torch.optim.SGD(model.parameters(), lr=lr)
# MAGIC         rows = MyDataset(path)
# MAGIC         for epoch in range(10):
# MAGIC             sampler.set_epoch(epoch)
# MAGIC             for x, y in DataLoader(rows, batch_size=16, sampler=sampler):
# MAGIC                 optimizer.zero_grad()
# MAGIC                 nn.functional.huber_loss(model(x), y).backward()
# MAGIC                 optimizer.step()
# MAGIC         ...
# MAGIC
# MAGIC     TorchDistributor(num_processes=2, local_mode=False, use_gpu=False).run(train, "/dbfs/rows", 0.1)

# COMMAND ----------

from functools import partial

import torch
from torch import nn

from sparkdeep import TorchEstimator

df = spark.range(500).selectExpr("array(cos(id), sin(id)) AS x", "float(2 * cos(id) - sin(id)) AS y")


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x).squeeze(1)


def training_step(model, batch):
    return nn.functional.huber_loss(model(batch.features), batch.labels)


estimator = TorchEstimator(
    num_workers=2, model=Net, model_args={"width": 32}, optimizer=partial(torch.optim.SGD, lr=0.1),
    training_step=training_step, feature_cols="x", label_cols="y", batch_size=16, epochs=10, seed=0, progress=False,
)  # fmt: skip
model = estimator.fit(df)
print(f"loss {model.history[0].loss:.4f} at first, {model.history[-1].loss:.4f} at last")

# COMMAND ----------

error = model.transform(df).selectExpr("sqrt(avg(pow(y - prediction, 2)))").first()[0]
print(f"root mean square error {error:.3f}")
