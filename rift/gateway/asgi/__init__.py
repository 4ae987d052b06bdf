"""HTTP, without any knowledge of inference.

request       a request with a bounded body, and its answer
body_budget   how many bytes of bodies may be under way
parse_turns   when a large body may be parsed, or a long history read
errors        errors in OpenAI's form
cors          headers for browsers: CORS and timing
trace_context headers of distributed tracing
tally         counts of what clients cause at any rate, for the log
static_files  the playground and the API reference, from `static/`
strict_parser  refusal of ambiguous heads and chunks
connections   sockets: their number, deadlines and buffers
server        HTTP/1.1 by hypercorn
"""
