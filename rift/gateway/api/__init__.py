"""The routes: one table, the handlers of stored requests and billing, and the published document.

routes           the route table: method, path, handler, documented answers
stored_requests  a stored request by its id, for all APIs
account_turns    how many calls an account may have in progress
content_erasure  erases the content of a sealed request
requests         the native routes of stored requests
responses        the routes of stored responses
models           the served models
billing          an account's requests, invoices and usage
health           health, version and the document
openapi          the OpenAPI document, generated from the table
schemas          the types in it
"""
