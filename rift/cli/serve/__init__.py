"""The commands that serve until a signal stops them.

up       up
gateway  gateway
worker   worker
control  control

control_parts  what control needs of others
"""
