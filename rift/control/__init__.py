"""Control: one elected leader projects the log, bills, scales and cleans up.

process         builds and runs the process
config          its settings
scaling_config  how each served model scales
leader          election and fencing
leader_duties   starts the duties of an elected leader
fleet_counts    what happened to the fleet, for metrics
samples         how the log and the disks are, for metrics
projection/     keeps the warehouse up to date
duties/         background tasks of the leader
rpc/            answers questions from gateways and commands
sql/            the process that answers operators' SQL
"""
