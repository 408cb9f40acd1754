"""The sections of jobs/benchmark.py, one file each, and what they share."""
