"""In-process twins and the fault injector; only tests and benchmarks import it.

- `in_process.py`: replicas as threads of this process: a stage's, and those of a job a round
- `injection.py`: faults on purpose, each exactly once
"""
