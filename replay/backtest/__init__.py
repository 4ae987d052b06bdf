"""Scaling policies on a trace, in simulated time: what they would have cost, and who would have waited.

traces.py     the workloads: published traces, and Rift's own log
engine.py     the fleet that serves one, event by event
policies.py   who says how many replicas: our `decide`, and what it is compared with
oracle.py     the one that knows the future
run.py        a trace through a policy, to a Result
plot.py       a picture of it
"""
