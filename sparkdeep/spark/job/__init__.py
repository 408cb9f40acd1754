"""Whole jobs for spark-submit: configuration in, exit code and result.json out.

- `config.py`: what a TOML file may say
- `metrics.py`: metrics by name
- `report.py`: what a job's report is made of
- `result.py`: exit codes and result files
- `run.py`: a job from its configuration to its exit code
- `sources.py`: a job's session, rows and split
- `steps.py`: steps that are done once
"""
