"""The lines that processes write to their logs.

formats   the two formats, and how to read a line of either
setup     what a process logs, and where
"""
