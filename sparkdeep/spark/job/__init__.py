"""Whole jobs for spark-submit: configuration in, exit code and result.json out.

- `config.py`: what a TOML file may say
- `metrics.py`: metrics by name
- `result.py`: exit codes, result files and reports
- `run.py`: a job from its configuration to its exit code
- `sources.py`: a job's session, rows and split
- `steps.py`: steps that are done once
"""
