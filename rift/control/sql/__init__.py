"""Operators' SQL: a process of its own with a database of its own, which follows the log as a standby does.

One function call of DuckDB can take a minute or all memory, and neither its clock nor its memory limit
notices. Only a process that may be killed bounds a question. Control's leader starts it at the first
question. It answers one question at a time, so that the question which exceeds a limit is known, and no other
one dies with it. Control passes the bytes of its replies on without reading them.

host     starts, bounds and ends the process; in control and in commands
process  the process: reads questions, answers them within its limits
standby  its database, which follows the log
frames   how the two talk over a pipe
"""
