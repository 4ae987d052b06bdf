"""The background tasks of a leader.

janitor            ends the requests that no live process will end
supervision        the janitor's rules
agenda             the requests to which the janitor applies them
autoscaler         decides how many replicas each model has
floor_planner      plans the fewest replicas of each model by a replay of its recent past
scaling_inputs     the inputs of a decision, from the projection
replica_reports    the fleet, and which replicas are silent
archiver           archives segments and trims the log
credit_settlement  settles the credit holds of lost gateways
usage_correction   corrects the charges of answers that no client could read
shared_seconds     the correction of a request that is charged by the second
key_erasure        erases the keys of encrypted content
period_close       makes a month's invoices final
"""
