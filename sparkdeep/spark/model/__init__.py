"""`TorchModel`: a trained network as a Spark ML model.

columns         which columns it reads and writes
files           its files, as Spark ML's writers and readers
model           the class
params          settings as Spark ML params
pyfunc          the model in MLflow
scoring         batched inference on executors
stored_values   settings as JSON, callables by name
"""
