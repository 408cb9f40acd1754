"""`sparkdeep.doctor`: what would keep a session from training, and what to change.

conf_checks       what Spark's properties say
conf_values       Spark's properties as typed values
doctor            the function, and the command's session
executor_checks   what tasks saw on executors, judged
findings          findings, and the report that prints them
probes            the small jobs that look around on executors
"""
