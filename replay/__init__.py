"""What follows from the log: facts, SQL, money and scaling decisions.

facts/        records of the log to rows
archive/      sealed segments of the log in Parquet
warehouse/    the DuckDB file and its queries
billing/      invoices and usage
scaling/      demand, the scaling policy, and its verification
backtest/     a policy on a trace
sql/          one relation, check or query a file
sql_files     reads a file of sql/
errors        the root of this package's errors
audit_export  a customer's facts with proofs
auditor       checks an export with the standard library alone
"""
