"""The sections of jobs/benchmark.py, each runnable alone."""
