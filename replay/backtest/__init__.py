"""Scaling policies on a trace, in simulated time: what they would have cost, and who would have waited.

traces     workloads: published traces, and Rift's own log
simulator  the fleet that serves one, event by event
policies   ours, a static fleet, and Knative's
oracle     the policy that knows the future
run        a trace through a policy, to a Result
plot       a picture of it
"""
