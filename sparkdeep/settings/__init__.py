"""What may be asked for, and what cannot be meant together.

- `contradictions.py`: settings that cannot be meant together
- `run.py`: settings of the local work, which travel to every replica, and of the run, which stay on the driver
"""
