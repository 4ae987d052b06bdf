"""The ASGI app: routes a request to its handler, and turns errors into answers."""

import logging
import re
from collections.abc import Callable, Sequence

from events import ids
from events.log import LogError, LogFull
from rift.gateway.api.routes import Handlers, Route
from rift.gateway.asgi import cors
from rift.gateway.asgi.errors import CRASH, ClientGone, HTTPError, retry_after
from rift.gateway.asgi.request import Receive, Request, Scope, Send
from rift.gateway.asgi.static_files import StaticFiles
from rift.gateway.asgi.tally import Tally
from rift.gateway.exchange import Exchanges

logger = logging.getLogger(__name__)

# Encoded slashes and NULs, which proxies may decode or cut. Only a model's name may contain a slash.
ENCODED = re.compile(rb"%(2f|5c|00)", re.IGNORECASE)
ENCODED_SLASH_BELOW = b"/v1/models/"


class Gateway:
    """`entropy` makes the ids of answers to requests that have none."""

    def __init__(
        self,
        routes: Sequence[Route],
        handlers: Handlers,
        exchanges: Exchanges,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._exchanges = exchanges
        self._entropy = entropy
        self._pages = StaticFiles()
        self._log_failures = Tally()
        self._routes = [
            (each.method, _pattern(each), each.handler(handlers), f"{each.method} {each.path}")
            for each in routes
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchanges.begin()
        own_id = self._entropy(ids.RANDOM_BYTES).hex()
        request = Request(scope, receive, send, own_id=own_id, exchange=exchange)
        try:
            await self._respond(request)
        except ClientGone:
            return
        except Exception as error:
            error.add_note(f"while {exchange.route or 'no route'} was answered")
            # The server answers, unless the answer has begun.
            if not exchange.status:
                exchange.status = CRASH.status
                exchange.code = CRASH.code
            raise
        finally:
            request.end()
            self._exchanges.end(exchange)

    async def _respond(self, request: Request) -> None:
        """Answer a request, also with an error. Raises ClientGone."""
        try:
            try:
                await self._route(request)
            except LogFull as error:
                message = "the log is full; try again later"
                raise HTTPError(503, message, code="log_full", headers=retry_after(60)) from error
            except LogError as error:
                self._log_failed(request, error)
                message = "the log does not answer; try again"
                raise HTTPError(503, message, code="log_unavailable", headers=retry_after(2)) from error
        except HTTPError as refusal:
            await request.drain()
            request.exchange.code = refusal.code
            await request.answer(refusal.status, refusal.body(), refusal.headers)

    def _log_failed(self, request: Request, error: LogError) -> None:
        """Log the failure, once for many: while the log is down, every request fails."""
        if counts := self._log_failures.add("failed"):
            logger.warning(
                "the log did not answer %d requests, the last %s: %s",
                counts["failed"],
                request.exchange.route,
                error,
            )

    async def _route(self, request: Request) -> None:
        if problem := _ambiguity(request.raw_path):
            raise HTTPError(400, problem, code="malformed_http", headers=[(b"connection", b"close")])
        if request.path in self._pages:
            request.exchange.route = f"GET {request.path}"
            return await self._pages.answer(request)
        if cors.is_open(request.path):
            if cors.is_preflight(request):
                return await cors.answer_preflight(request)
            request.always = cors.ALWAYS
        allowed = set()
        for method, pattern, handler, name in self._routes:
            if match := pattern.fullmatch(request.path):
                if method == request.method or (method, request.method) == ("GET", "HEAD"):
                    request.exchange.route = name
                    return await handler(request, *match.groups())
                allowed.add(method)
        if allowed:
            allow = ", ".join(sorted(allowed))
            message = f"{request.path} supports {allow}, not {request.method}"
            headers = [(b"allow", allow.encode())]
            raise HTTPError(405, message, code="method_not_allowed", headers=headers)
        raise HTTPError(404, f"no route {request.path} exists; see /docs", code="not_found")


def _ambiguity(path: bytes) -> str:
    """Return what a proxy could read differently in a path, or ""."""
    encoded = {match.lower() for match in ENCODED.findall(path)}
    if path.startswith(ENCODED_SLASH_BELOW):
        encoded.discard(b"2f")
    return f"the path must not contain %{encoded.pop().decode()}" if encoded else ""


def _pattern(route: Route) -> re.Pattern[str]:
    return re.compile(re.escape(route.path).replace(r"\{id\}", f"({route.id_pattern})"))
