"""The warehouse: the DuckDB file with the facts, and queries on it.

warehouse    stores rows and applied positions in one transaction
fact_tables  writes facts, and restores the fold from them
queries      answers SELECTs within limits
totals       what was applied since the file was opened, for metrics
result       a query's rows, or why it was refused
rebuild      a fresh file from the archive
"""
