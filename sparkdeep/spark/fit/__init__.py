"""A fit on Spark: the settings of `TorchEstimator` checked, its rows dealt, its rounds run, its model made.

- `checkpoints.py`: where a fit, or one fit of a search, keeps its checkpoints
- `estimator.py`: `TorchEstimator`
- `estimator_files.py`: an estimator saved and loaded
- `programs.py`: program and schema of a fit, rehearsed on the driver
- `settings.py`: the settings of one fit as a checked value
- `shard_source.py`: a fit's rows as persisted shards
- `training.py`: one fit through Spark, from DataFrame to model
- `transports.py`: which transport a fit takes
"""
