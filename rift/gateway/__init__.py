"""The gateway: HTTP on one side, the log on the other. It does not depend on engines, workers or databases.

Folders are layers; each imports only those before it.

    bounds       a bound and its use, for metrics
    exchange     one HTTP request as it went, and its observers
    request_log  a line in the log for each request
    asgi/        HTTP: requests, errors, CORS, static pages, the server
    completion   one request's counted events
    choices      the requests of a body with several prompts or `n` > 1
    histories    stored requests, long ones in turns of their accounts
    state        shared by all parts: the log, its folds, the configuration
    dialects/    each API's bodies and frames
    streams/     from a lane's events to waiting clients
    admission/   keys, queue, rate limits, credit, room
    submission/  appends a new request to the log
    api/         the route table, stored requests, billing, the OpenAPI document
    metrics      what Prometheus scrapes
    app          the ASGI app: routing and error mapping
    process      the process: builds and connects all of it
"""
