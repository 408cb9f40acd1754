"""The sections of the benchmark, each runnable alone."""
