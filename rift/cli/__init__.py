"""The command line. Exit status 0: done; 1: failed, and said why; 2: wrong usage.

options.py   what each command takes
roles.py     the processes: up, gateway, worker, control
ops.py       questions and entries: sql, keys
limits.py    credit and limits
backtest.py  scaling policies on traces
"""

from rift.cli.parser import main

__all__ = ["main"]
