"""One HTTP request for the routes: a bounded body in, an answer out."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

import anyio
import msgspec

from events.clock import now_s
from events.contracts import BODY_BYTES_MAX, SECOND_NS
from events.schema import RequestAccepted
from rift.gateway.asgi.body_budget import BodyHold
from rift.gateway.asgi.errors import ClientGone, Headers, HTTPError
from rift.gateway.asgi.trace_context import traceparent
from rift.gateway.exchange import Exchange

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# An extension of our server: write a chunk at once, or return False if the client is slow.
WRITE_CHUNK = "rift.write_chunk"
WriteChunk = Callable[[bytes], bool]

# An extension of our server: set the chunk that finds out whether a client that has closed its side is gone.
PROBE = "rift.probe"
SetProbe = Callable[[bytes], None]

# An extension of our server: call a function once the client has left before its answer's end; at once if it
# has.
WHEN_GONE = "rift.when_gone"
WhenGone = Callable[[Callable[[], None]], None]

# An extension of our server: return the error that it sent in place of an answer, None if it sent none.
REFUSED = "rift.refused"
Refused = Callable[[], HTTPError | None]

# A client's own id is stored and echoed only if it is visible ASCII, without spaces.
CLIENT_ID = re.compile(r"[!-~]{1,128}")

# A body that takes longer than this is rejected.
BODY_S = 30.0
# So is a larger one that stalls: after SLOW_S it must have arrived at BYTES_PER_S_MIN. The largest needs four
# times that rate to arrive in time.
SLOW_BYTES = 64 * 1024
SLOW_S = 5.0
BYTES_PER_S_MIN = 64 * 1024


class Request:
    """One HTTP request. `body` may be read once.

    `own_id` names the answer unless the exchange has a `request_id`, which an answer about an accepted
    request has, or the client named it in `x-request-id`. `key` is the id of the authenticated key, and
    `limits` returns the headers of its rate limits at the moment an answer begins. `always` are headers of
    every answer.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, own_id: str, exchange: Exchange
    ) -> None:
        self._began_at_s = now_s()
        self._scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.receive = receive
        self.send = send
        self._body_read = False
        self.own_id = own_id
        self.exchange = exchange
        exchange.client = (scope.get("client") or ("",))[0]
        self.key = ""
        self.limits: Callable[[], Headers] = tuple
        self.always: Headers = ()

    @property
    def raw_path(self) -> bytes:
        """The path before it was decoded."""
        return self._scope.get("raw_path", b"")  # type: ignore[no-any-return]

    @property
    def write_chunk(self) -> WriteChunk | None:
        """For use between `start` and the last `write` only, and not during a `write`."""
        return self._scope.get("extensions", {}).get(WRITE_CHUNK)  # type: ignore[no-any-return]

    def age_ns(self) -> int:
        """Return the time since the request's head arrived."""
        return int((now_s() - self._began_at_s) * SECOND_NS)

    def probe_with(self, data: bytes) -> None:
        """Write `data` to a client that has closed its side now and then, until the last `write`.

        Call it after `start` for a streamed answer, with something that the client ignores.
        """
        if (set_probe := self._scope.get("extensions", {}).get(PROBE)) is not None:
            set_probe(data)

    def header(self, name: bytes) -> str | None:
        for key, value in self._scope["headers"]:
            if key.lower() == name:
                return str(value, "latin-1")
        return None

    def headers(self, name: bytes) -> list[str]:
        """Return the values of all headers of this name, in the order in which they were sent."""
        return [str(value, "latin-1") for key, value in self._scope["headers"] if key.lower() == name]

    def answer_about(self, accepted: RequestAccepted) -> None:
        """Name the accepted request and its span in the headers of the answer."""
        self.exchange.request_id = accepted.request
        self.exchange.model = accepted.model
        self.always = [*self.always, (b"traceparent", traceparent(accepted).encode())]

    @property
    def client_id(self) -> str | None:
        """The client's `X-Request-Id`, or None if it is missing or not valid."""
        sent = self.header(b"x-request-id")
        return sent if sent is not None and CLIENT_ID.fullmatch(sent) else None

    def query(self) -> dict[str, str]:
        return dict(self.query_pairs())

    def query_pairs(self) -> list[tuple[str, str]]:
        return parse_qsl(self._scope["query_string"].decode("latin-1"))

    def asks(self, name: str) -> bool:
        """Return whether a parameter of the query is true, as JSON, Python or a shell writes it."""
        return self.query().get(name, "").lower() in ("true", "1")

    async def body(self, hold: BodyHold) -> bytearray:
        """Return the whole body, counted in `hold`. Raises HTTPError (408, 413, 429, 503) and ClientGone."""
        data = bytearray()
        declared = self.header(b"content-length") or ""
        # Refused before it is read, if its size is known.
        hold.grow(int(declared) if declared.isdecimal() else 0)
        began_at_s = now_s()
        more = True
        while more:
            due_at_s = began_at_s + BODY_S
            if hold.size > SLOW_BYTES:
                due_at_s = min(due_at_s, began_at_s + SLOW_S + len(data) / BYTES_PER_S_MIN)
            message: MutableMapping[str, Any] = {}
            with anyio.move_on_at(due_at_s):
                message = await self.receive()
            if not message:
                self._body_read = True
                raise HTTPError(
                    408,
                    f"the body did not arrive within {BODY_S:.0f} s, or stalled; send it again",
                    code="body_timeout",
                )
            if message["type"] == "http.disconnect":
                raise ClientGone
            hold.grow(len(data) + len(message.get("body", b"")))
            data += message.get("body", b"")
            more = message.get("more_body", False)
        self._body_read = True
        return data

    async def drain(self) -> None:
        """Skip the rest of the body: some clients fail if the answer comes before they have sent it.

        Of a body more than twice as large as any that is accepted, the rest is not read, and the connection
        is closed. Raises ClientGone.
        """
        size = 0
        more = not self._body_read
        with anyio.move_on_after(BODY_S):
            while more and size <= 2 * BODY_BYTES_MAX:
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
        self._body_read = True

    async def disconnected(self) -> None:
        """Return once the client has disconnected. Call it only after the body was read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def when_gone(self, call: Callable[[], None]) -> None:
        """Call a function once the client has disconnected before the end; at once if it has.

        Call it only after the body was read. A task that awaits `disconnected` would cost more.
        """
        self._scope["extensions"][WHEN_GONE](call)

    def end(self) -> None:
        """Note in the exchange what the client was answered, if the server did that."""
        refused: Refused | None = self._scope.get("extensions", {}).get(REFUSED)
        if refused is not None and (error := refused()) is not None:
            self.exchange.status = error.status
            self.exchange.code = error.code

    async def start(self, status: int, content_type: bytes, headers: Headers = ()) -> None:
        took_ms = (now_s() - self._began_at_s) * 1000
        exchange = self.exchange
        exchange.status = status
        exchange.client_request_id = self.client_id or ""
        rift_id = [(b"rift-request-id", exchange.request_id.encode())] if exchange.request_id else []
        named = [
            (b"content-type", content_type),
            (b"x-request-id", (exchange.client_request_id or exchange.request_id or self.own_id).encode()),
            *rift_id,
            (b"openai-processing-ms", b"%d" % took_ms),
            *self.limits(),
            (b"server-timing", b"app;dur=%.1f" % took_ms),
            *self.always,
            *headers,
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": named})

    async def write(self, data: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def write_part(self, data: bytes, *, more: bool) -> None:
        """Write a part of a chunked answer. Of a client that kept up until now, only the connection keeps
        it, and counts what is not read: on the way of `write` two more copies would wait for the client."""
        if data and self.write_chunk is not None and self.write_chunk(data):
            data = b""
        if data or not more:
            await self.write(data, more=more)

    async def answer(self, status: int, value: Any, headers: Headers = ()) -> None:
        """Answer with one JSON value."""
        data = msgspec.json.encode(value)
        length = (b"content-length", str(len(data)).encode())
        await self.start(status, b"application/json", [length, *headers])
        await self.write(data, more=False)
