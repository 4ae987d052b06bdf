"""Scaling policies on a trace, in simulated time: their cost and the latency of requests.

traces     workloads: published traces, and Rift's own log
simulator  the fleet that serves a trace, event by event
policies   Rift's policy, a static fleet, and Knative's
oracle     the policy that knows the future
run        a trace through a policy, to a Result
frontier   cost against the share in time, for several policies
plot       a picture of it
"""
