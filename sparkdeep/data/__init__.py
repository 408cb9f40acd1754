"""The data plane without Spark: columns to fields, shards on disk, the order of an epoch, batches of tensors."""
