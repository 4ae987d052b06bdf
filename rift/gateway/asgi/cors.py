"""Headers for browsers: cross-origin permission (CORS) and `Server-Timing`.

Every origin is allowed. That is safe because no cookie authenticates a request: a page needs an API key, and
with it learns no more than the key's owner could learn with curl.
"""

from collections.abc import Mapping

from rift.gateway.asgi.errors import Headers
from rift.gateway.asgi.request import Request

# How long a browser caches a preflight answer, in seconds: the longest that any browser accepts.
LEAVE_S = 7200

# `*` covers all headers except Authorization. Clients add headers of their own to those of the API.
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
    """Return whether pages of other origins may read answers of this path."""
    return path.startswith("/v1/") or path == "/openapi.json"


def is_preflight(request: Request) -> bool:
    return request.method == "OPTIONS" and request.header(b"access-control-request-method") is not None


async def answer_preflight(request: Request) -> None:
    await request.start(204, b"text/plain", PREFLIGHT)
    await request.write(b"", more=False)


def server_timing(timing: Mapping[str, float | None]) -> Headers:
    """Return the timing that is known so far, for the developer tools of browsers."""
    known = [f"{name.removesuffix('_ms')};dur={ms:.1f}" for name, ms in timing.items() if ms is not None]
    return [(b"server-timing", ", ".join(known).encode())] if known else []
