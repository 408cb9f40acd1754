"""`TorchEstimator`: from its settings and a DataFrame to a trained model.

checkpoints       where a fit keeps its checkpoints
estimator         the class
estimator_files   its files, as Spark ML's writers and readers
programs          the user's objects, put together and rehearsed
settings          every setting of a fit as one checked value
shard_source      the fit's rows as persisted shards
training          the steps of a fit
transports        how replicas are reached, and what that rules out
"""
