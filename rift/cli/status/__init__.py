"""`rift status`: running processes, queues, speed, lag, and parts that fail or do not answer.

command  the command; `--watch`
report   what log and control leader know, and the problems
text     the report as text for a terminal
"""
