"""The one door to pyspark: ingest, barrier stages, the estimator and the model; nothing outside imports pyspark."""
