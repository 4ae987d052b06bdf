"""A new request's way into the log.

submit             from a body to a stored acceptance and its answer
body_reader        a body, counted while it arrives and parsed
acceptance         acceptances, built from a body and the book
acceptance_writer  acceptances, encrypted and appended
responder          the answer to a request that the log holds
idempotency        one request for each idempotency key
"""
