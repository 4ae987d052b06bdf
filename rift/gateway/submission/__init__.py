"""A new request's way into the log.

submit       from a parsed body to a stored acceptance and its answer
idempotency  one request for each idempotency key
"""
