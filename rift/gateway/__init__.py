"""The gateway: HTTP in front, the log behind. It knows no engine, no worker and no database.

Folders are layers; each imports only those before it.

    state        what all parts share: the log, its folds, the configuration
    asgi/        HTTP: requests, errors, CORS, static pages, the server
    completion   one request's counted events
    choices      the choices of a request with `n` > 1
    dialects/    each API's bodies and frames
    streams/     events of a lane to the clients that wait
    admission/   who may ask for what: keys, limits, credit, room
    submission/  a new request's way into the log
    api/         routes for what exists already, and the published document
    app          the ASGI app: routing and error mapping
    process      the process: builds and connects all of it
"""
