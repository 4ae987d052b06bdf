"""The processes: gateway, worker and control, and the command line that starts them.

gateway/    HTTP in front, the log behind
worker/     takes requests from the log and answers through it
engines/    vLLM, and its simulated twin
control/    the elected leader: projection, bills, scaling, housekeeping
fleet/      starts and stops replicas, locally or on Kubernetes
cli/        the command line
errors      the root of this package's errors
settings    `rift.toml` and the options that override it
catalogue   models, their prices and profiles
prices      price lists as files and as events
keys        API keys as text
clock       the wall clock: the only place that reads it
data_dir    the installation's folder
book_admin  what operators write into the book
rpc         questions to control
nats_server the embedded broker
supervisor  child processes, restarted
launcher    `rift up`: a whole installation on this machine
calibrate   measurements of one replica to a hardware profile
"""

__version__ = "0.1.0"
