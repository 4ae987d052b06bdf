"""Bills: computed from facts, in whole nano-USD.

invoice       an account's invoice of a month
request_list  an account's requests, newest first
focus_csv     an invoice as FOCUS 1.2
"""
