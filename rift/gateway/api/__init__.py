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
error_codes      every error code, with its statuses and remedy
schemas          the types of the answers
openai_schemas   the types of OpenAI's answers
"""
