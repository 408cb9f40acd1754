"""DataFrames to shards on executors.

dealing_by_key     all rows with the same key go to the same replica
ingest             the DataFrame whose tasks write shards, and what they report
petastorm_native   datasets that petastorm wrote, read by Spark
petastorm_source   datasets that petastorm itself reads
portions           shards that move to wherever a task runs
redealing          shards dealt again to another number of replicas
tasks              what runs on executors to write a shard
"""
