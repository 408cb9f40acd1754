"""The Spark session as everything else sees it: what it can do, its slots, its jobs and their failures.

access      what differs between a classic session and Spark Connect
failures    named errors across the boundary between executors and driver
hadoop      a store through Spark's own file systems
jobs        a Spark action in a thread, with a tag and a deadline
parcels     bytes on their way to executors
placement   the device that a task computes on
preflight   what can be checked before anything runs
slots       which fit of this driver holds how many slots
task        what a task can find out about where it runs
types       Spark's column types as ours
"""
