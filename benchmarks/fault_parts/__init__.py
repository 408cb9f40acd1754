"""The parts of `benchmarks/faults.py`: each gives `run(...) -> dict`, JSON-ready, with `title`, `lines` and `failed`."""
