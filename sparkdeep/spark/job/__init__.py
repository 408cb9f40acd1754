"""spark-submit jobs: a TOML file in, an exit code and a result file out.

config    the TOML file, checked
metrics   metrics by name
report    what the report of a job shows
result    the exit code and the result file
run       a job from start to end
sources   the session and the rows
steps     a pipeline's steps, each runnable alone
"""
