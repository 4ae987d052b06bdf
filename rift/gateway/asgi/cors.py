"""What browsers and tools need beside an answer: leave for pages of other origins, and how long it took.

Any page may ask, and that is safe: a key is sent by who has it, never by the browser itself as a cookie would
be. So a page learns with a key what its owner could learn with curl, and without one nothing.
"""

from collections.abc import Mapping

from rift.gateway.asgi.errors import Headers
from rift.gateway.asgi.request import Request

# How long a browser need not ask again, seconds: the longest that one of them keeps.
LEAVE_S = 7200

# `*` is every name but Authorization's: clients send headers of their own beside those of the API.
PREFLIGHT = [
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, idempotency-key, last-event-id, x-request-id, *",
    ),
    (b"access-control-max-age", b"%d" % LEAVE_S),
]
ALWAYS = [
    (b"access-control-allow-origin", b"*"),
    (b"access-control-expose-headers", b"*"),
    (b"timing-allow-origin", b"*"),
]


def is_open(path: str) -> bool:
    """Say whether pages of other origins may read what this path answers."""
    return path.startswith("/v1/") or path == "/openapi.json"


def is_preflight(request: Request) -> bool:
    return request.method == "OPTIONS" and request.header(b"access-control-request-method") is not None


async def answer_preflight(request: Request) -> None:
    await request.start(204, b"text/plain", PREFLIGHT)
    await request.write(b"", more=False)


def server_timing(timing: Mapping[str, float | None]) -> Headers:
    """Say what of an answer's timing is known by now, as browsers' tools show it."""
    known = [f"{name.removesuffix('_ms')};dur={ms:.1f}" for name, ms in timing.items() if ms is not None]
    return [(b"server-timing", ", ".join(known).encode())] if known else []
