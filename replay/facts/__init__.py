"""Records of the log to rows of facts.

fold          reads every stream in order and emits rows
rows          the rows, one struct a table
request_rows  rows of requests and attempts
book_rows     rows of the book's entries
fleet_rows    the fleet's rows back to events
"""
