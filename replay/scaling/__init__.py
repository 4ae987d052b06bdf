"""Scaling: the number of replicas as a pure function of the log.

demand        the demand that a decision is based on
demand_query  reads demand from the warehouse
arrivals      the recent requests in slots of time, which the floor replays
floor         the fewest replicas by a replay of the recent past
policy        the rules: demand to a number of replicas
verify        makes every decision again and compares
hardware      what one replica can do; `hardware.toml` holds the profiles
"""
