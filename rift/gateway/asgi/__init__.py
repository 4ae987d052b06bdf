"""HTTP, without a thought of inference.

request       a request with a bounded body, and its answer
errors        errors in OpenAI's form
cors          what browsers of other origins may do
static_files  the pages for people, from `static/`
server        hypercorn
"""
