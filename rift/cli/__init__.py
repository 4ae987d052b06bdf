"""The command line. Exit status 0: done; 1: failed, with a message; 2: wrong usage.

parser      builds the parser and maps failures to messages
serve       up, gateway, worker, control
status      status
models      models list, models add
calibrate   calibrate
keys        keys
limits      limits
credit      credit
accounts    accounts
money       invoice, prices, period, correct, rerate
replay      replay, archive, audit
backtest    backtest
output      tables, money and times as text
connection  the installation and the log that a command talks to
"""

from rift.cli.parser import main

__all__ = ["main"]
