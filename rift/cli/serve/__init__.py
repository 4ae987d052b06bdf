"""The commands that serve until a signal stops them.

up       up
gateway  gateway
worker   worker
control  control
"""
