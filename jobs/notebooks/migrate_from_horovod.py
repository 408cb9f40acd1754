# Databricks notebook source
# MAGIC %md
# MAGIC # From Horovod's TorchEstimator
# MAGIC Both take a DataFrame and give a Spark ML transformer. What differs: no Store and no Parquet files in between (rows go to
# MAGIC the executors' own disks), parameters are averaged every `sync_every` steps in place of gradients at every step, and
# MAGIC `transform` predicts in batches.
# MAGIC
# MAGIC | `horovod.spark.torch.TorchEstimator` | `sparkdeep.TorchEstimator` |
# MAGIC |---|---|
# MAGIC | `num_proc` | `num_workers` |
# MAGIC | `model` | `model`: the module, or a class or function that makes it |
# MAGIC | `backend` | none: Spark's barrier stages |
# MAGIC | `store` | none; `checkpoint_dir` for checkpoints, `shard_dir` to keep rows on shared storage |
# MAGIC | `optimizer` | `optimizer`: a factory, `partial(torch.optim.Adam, lr=1e-3)`, in place of an instance |
# MAGIC | `loss` | `loss`; several losses: `training_step` |
# MAGIC | `loss_constructors` | `loss`: it travels by value |
# MAGIC | `metrics` | `metrics={"name": f(output, label)}`, or torchmetrics objects |
# MAGIC | `loss_weights` | inside `training_step` |
# MAGIC | `sample_weight_col` | `weight_col`; also weighs the replicas' mean |
# MAGIC | `gradient_compression` | none: `sync_every=10` sends a tenth of the bytes |
# MAGIC | `feature_cols` | `feature_cols`: a list is laid side by side as (rows, k); `{"x": "a", "y": "b"}` feeds named arguments |
# MAGIC | `input_shapes` | none: shapes come from the rows; reshape in `forward` or `preprocess` |
# MAGIC | `validation` | `validation`: a fraction, a boolean column, or a DataFrame |
# MAGIC | `label_cols` | `label_cols` |
# MAGIC | `callbacks` | `callbacks`: called on the driver with each round's record |
# MAGIC | `batch_size` | `batch_size`: of each replica, as before; the learning rate is never multiplied by the workers |
# MAGIC | `val_batch_size` | none: validation uses `batch_size` |
# MAGIC | `epochs` | `epochs` |
# MAGIC | `verbose` | `progress` |
# MAGIC | `random_seed` | `seed` |
# MAGIC | `shuffle_buffer_size` | `window_rows`, `block_rows`; smaller shards are shuffled whole |
# MAGIC | `shuffle` | always: rows are dealt by a hash, and drawn in a new order each epoch |
# MAGIC | `partitions_per_process` | none |
# MAGIC | `run_id` | `checkpoint_dir`, with the round it stopped at |
# MAGIC | `train_minibatch_fn` | `training_step(model, batch) -> loss` |
# MAGIC | `train_steps_per_epoch` | `train_df.limit(n)` |
# MAGIC | `validation_steps_per_epoch` | a smaller `validation` |
# MAGIC | `transformation_fn` | `preprocess` (everywhere), `augment` (in training), on whole batches of tensors |
# MAGIC | `train_reader_num_workers` | none: batches are gathered from memory maps |
# MAGIC | `val_reader_num_workers` | none |
# MAGIC | `reader_pool_type` | none |
# MAGIC | `label_shapes` | none |
# MAGIC | `inmemory_cache_all` | none: the operating system keeps mapped files in memory as far as it has any |
# MAGIC | `use_gpu` | `device="auto"`: the GPU that Spark gave the task, else the CPU; `gpus_per_worker` |
# MAGIC | `mp_start_method` | `worker_process` |

# COMMAND ----------

# MAGIC %pip install ../..

# COMMAND ----------

# MAGIC %md
# MAGIC With Horovod:
# MAGIC
# MAGIC     net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
# MAGIC     estimator = hvd.TorchEstimator(
# MAGIC         num_proc=2, store=Store.create("/dbfs/runs"), model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
# MAGIC         loss=nn.CrossEntropyLoss(), input_shapes=[[-1, 2]], feature_cols=["features"], label_cols=["label"],
# MAGIC         validation=0.1, batch_size=16, epochs=20, random_seed=1, verbose=1)
# MAGIC     model = estimator.fit(df).setOutputCols(["scores"])
# MAGIC     net = model.getModel()

# COMMAND ----------

from functools import partial

import torch
from torch import nn

from sparkdeep import TorchEstimator

df = spark.range(400).selectExpr(
    "array(cos(id), sin(id)) AS features", "bigint(cos(id) * sin(id) > 0) AS label"
)  # which quadrants a point of the circle lies in

net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
estimator = TorchEstimator(
    num_workers=2, model=net, optimizer=partial(torch.optim.SGD, lr=0.5), loss=nn.CrossEntropyLoss(),
    feature_cols="features", label_cols="label", validation=0.1, batch_size=16, epochs=20, seed=1,
    prediction_col="scores", progress=False,
)  # fmt: skip
model = estimator.fit(df)
net = model.getModel()

# COMMAND ----------

right = model.transform(df).selectExpr("avg(double((scores[1] > scores[0]) = (label = 1)))").first()[0]
print(f"{right:.1%} of the rows are told right")
