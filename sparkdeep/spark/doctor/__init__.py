"""Looks at a session and says what to change, before anything trains.

- `conf_checks.py`: what Spark properties tell about training
- `conf_values.py`: Spark properties as typed values
- `doctor.py`: `sparkdeep.doctor(spark)`
- `executor_checks.py`: what tasks saw where they ran, judged
- `findings.py`: what the doctor found
- `probes.py`: the doctor's tiny jobs
"""
