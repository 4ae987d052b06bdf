"""Everything derived from the log: facts, SQL, money and scaling decisions.

facts/        rows computed from the records of the log
archive/      sealed segments of the log in Parquet
warehouse/    the DuckDB file and its queries
billing/      invoices and usage
scaling/      demand, the scaling policy, and its verification
spans/        OpenTelemetry spans of requests
backtest/     scaling policies on recorded traces
sql/          one relation, check or query per file
sql_files     reads a file of sql/
questions     named questions with parameters, the files of sql/ask/
disk          whole files, and the name of a disk that is full or read-only
errors        the base class of this package's errors
audit_export  the log records behind an invoice, with proofs
auditor       checks an export with the standard library alone
"""
