"""Control: one elected leader projects the log, bills, scales and tidies up.

process         the process: elected, then its duties
leader          election and fencing
scaling_config  how each served model scales
projection/     keeps the warehouse current
duties/         what a leader does in the background
rpc/            answers questions of gateways and commands
"""
