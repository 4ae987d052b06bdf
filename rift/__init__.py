"""The processes gateway, worker and control, and the command line that starts them.

gateway/    serves HTTP from the log
worker/     claims requests from the log and appends answers
engines/    vLLM, and its simulated twin
control/    the elected leader: projection, bills, scaling, housekeeping
fleet/      starts and stops replicas, locally or on Kubernetes
broker/     who may do what at the broker, and its configuration
backup/     backups and restores
log_disk/   the embedded broker's disk, full or not
metrics/    what Prometheus scrapes
logs/       the lines that processes log
cli/        the command line
errors      root of this package's errors
settings    `rift.toml` and the options that override it
catalogue   models, their prices and profiles
price_lists price lists as files
keys        API keys as text
clock       the wall clock; no other module reads it
data_dir    the installation's folder
book_admin  writes of operators to the book
rpc         questions to control
nats_server the embedded broker
supervisor  child processes, restarted
launcher    `rift up`: a whole installation on this machine
startup     what `rift up` does with the log
calibrate   fits a hardware profile to measurements
"""

__version__ = "0.1.0"
