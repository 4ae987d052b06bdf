"""Routes for what exists already, and the published document.

requests  a request: its answer, its events again, its end
models    the models that are served
billing   requests, invoices and usage of an account
openapi   the OpenAPI document
schemas   the types in it
"""
