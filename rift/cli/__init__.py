"""The command line. Exit status 0: done; 1: failed, with a message; 2: wrong usage.

parser          the list of commands; failures to messages
arguments       how a command registers itself; shared options
connection      the installation, its settings and its log
output          tables, money and times as text
signals         runs a process until a signal stops it

serve/          up, gateway, worker, control
status/         status
log/            replay, quarantine, archive verify, audit export
shards          shards list, shards add
broker          broker config
models          models list, models add
sql             sql, ask
keys            accounts list; keys create, keys list, keys revoke
limits          limits set, limits list
credit          credit grant, credit list
invoices        invoice, period close, correct
prices          prices list, prices publish, rerate
calibrate       calibrate
backtest        backtest
"""

from rift.__main__ import main

__all__ = ["main"]
