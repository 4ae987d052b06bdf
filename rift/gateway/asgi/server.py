"""HTTP/1.1, by hypercorn's protocol over our own connections. No other module imports hypercorn.

Hypercorn's own server keeps the socket of a client that has left until its idle timer ends, limits neither
the number of connections nor their buffers, and always speaks HTTP/2 and WebSocket. So only its parser and
the order of its events are used: bytes come from `connections`, and requests run in our task group.
"""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import anyio
from anyio.abc import TaskGroup
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import EndBody, Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ConnectionState
from hypercorn.utils import UnexpectedMessageError

from events.clock import now_s
from rift.gateway.asgi import strict_parser
from rift.gateway.asgi.connections import (
    WRITE_BYTES,
    WRITE_S,
    ClientConnection,
    Connections,
    backlog,
    last_answer,
)
from rift.gateway.asgi.errors import CRASH, HTTPError
from rift.gateway.asgi.request import (
    PROBE,
    REFUSED,
    WHEN_GONE,
    WRITE_CHUNK,
    Receive,
    Scope,
    Send,
    SetProbe,
    WriteChunk,
)
from rift.gateway.asgi.strict_parser import HEAD_BYTES, HEAD_LINES

logger = logging.getLogger(__name__)

App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The gateway ends its streams before the server stops, so the server cuts the rest soon.
GRACEFUL_S = 2

# A connection sees only the bytes that the system has not taken, so the system gets bounds of its own.
SOCKET_OPTIONS = {
    # A client that acknowledges nothing, or has no room for more, is gone after this time, in milliseconds.
    "TCP_USER_TIMEOUT": WRITE_S * 1000,
    # The system takes this many bytes ahead of the client. By default it takes megabytes, and asks for more
    # only when a third of them is gone: a slow client would seem to read nothing for minutes.
    "TCP_NOTSENT_LOWAT": WRITE_BYTES,
}

# The most bytes of a body that wait for the app. The client waits behind them.
BODY_BYTES = 64 * 1024

# The chunks of a body that are read in one turn of the loop. Each takes 8 microseconds, also with one byte.
CHUNKS = 64

REFUSALS = {
    400: ("malformed_http", "the request is not valid HTTP/1.1"),
    431: (
        "headers_too_large",
        f"a request's head may have {HEAD_BYTES} bytes in {HEAD_LINES} lines; send fewer or shorter headers",
    ),
    501: ("encoding_unsupported", "this transfer encoding is not supported; use `chunked` or content-length"),
    505: ("http_version", "this gateway speaks HTTP/1.1; for HTTP/2, put a proxy in front of it"),
}

# An interim answer, which a client may ignore, and which resets the connection of one that is gone.
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# The headers of an answer by which h11 frames its body, and decides whether to keep the connection.
FRAMING = (b"connection", b"content-length", b"transfer-encoding")
_CONTROL = re.compile(rb"[^\t\x20-\x7e\x80-\xff]")

WEBSOCKET = "this gateway has no WebSockets; set `stream` to true to receive server-sent events"


async def serve(
    app: App,
    connections: Connections,
    *,
    host: str,
    port: int,
    stopped: Callable[[], Awaitable[None]],
) -> None:
    """Serve until `stopped` returns. Raises OSError (the port)."""
    config = _config(host, port)
    (listener,) = config.create_sockets().insecure_sockets
    _limit_unread(listener)
    async with anyio.create_task_group() as tasks:
        try:
            async with anyio.create_task_group() as requests:
                server = _Server(app, connections, config, tasks, requests)
                loop = asyncio.get_running_loop()
                waiting = backlog(connections.limit)
                listening = await loop.create_server(server.connect, sock=listener, backlog=waiting)
                with contextlib.closing(listening):
                    bound = listener.getsockname()[1]
                    logger.info("listening on port %d for up to %d connections", bound, connections.limit)
                    tasks.start_soon(connections.check)
                    await stopped()
                await server.end_idle()
                requests.cancel_scope.deadline = now_s() + GRACEFUL_S
        finally:
            # The loop cannot end before every socket has: also if this task is cancelled.
            connections.abort_all()
        tasks.cancel_scope.cancel()


def _config(host: str, port: int) -> Config:
    config = Config()
    config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    config.include_server_header = False
    config.h11_max_incomplete_size = HEAD_BYTES
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


def _limit_unread(listener: socket.socket) -> None:
    """Set options that accepted sockets inherit, where the system has them."""
    for name, value in SOCKET_OPTIONS.items():
        if (option := getattr(socket, name, None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


class _Server:
    def __init__(
        self, app: App, connections: Connections, config: Config, tasks: TaskGroup, requests: TaskGroup
    ) -> None:
        self._app = app
        self._connections = connections
        self._config = config
        self._tasks = tasks
        self._requests = requests
        self._context = WorkerContext(None)

    def connect(self) -> ClientConnection:
        """Return the protocol of a new socket."""

        def start(connection: ClientConnection) -> None:
            self._tasks.start_soon(self._converse, connection)

        return ClientConnection(self._connections, start)

    async def end_idle(self) -> None:
        """Close every connection without a request, and each of the others after its answer."""
        await self._context.terminated.set()
        self._connections.close_waiting()

    async def _converse(self, connection: ClientConnection) -> None:
        protocol = _Protocol(connection, self._config, self._context, partial(self._spawn, connection))
        try:
            with connection.reading, contextlib.suppress(_Refused):
                while data := await connection.read():
                    await protocol.handle(RawData(data))
            await protocol.handle(Closed())
        except Exception:
            logger.exception("a connection failed")
        finally:
            connection.close()
            protocol.forget()

    def _spawn(self, connection: ClientConnection, scope: Scope, receive: Receive, send: Send) -> None:
        if (write := chunk_writer(connection, scope)) is not None:
            extensions = {WRITE_CHUNK: write, PROBE: probe_setter(connection)}
            scope["extensions"] = {**scope.get("extensions", {}), **extensions}
        self._requests.start_soon(self._answer, scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        try:
            try:
                await self._app(scope, receive, send)
            except Exception:
                logger.exception("a request failed")
                headers, body = last_answer(CRASH)
                # Raised if the answer has begun.
                with contextlib.suppress(UnexpectedMessageError):
                    await send({"type": "http.response.start", "status": CRASH.status, "headers": headers})
                    await send({"type": "http.response.body", "body": body, "more_body": False})
            # Ends the request.
            await send(None)
        except Exception:
            logger.exception("the end of a request failed")


class _Refused(Exception):
    """The connection was answered with an error and closed."""


class _Protocol(H11Protocol):
    """Hypercorn's HTTP/1.1, without its ways to HTTP/2 and WebSocket, and with errors in our form."""

    def __init__(
        self,
        connection: ClientConnection,
        config: Config,
        context: WorkerContext,
        spawn: Callable[[Scope, Receive, Send], None],
    ) -> None:
        super().__init__(
            None,  # type: ignore[arg-type]  # the app: `spawn` has it
            config,
            context,
            self,  # type: ignore[arg-type]  # the task group: hypercorn calls `spawn_app` only
            ConnectionState({}),
            ssl=False,
            client=connection.peer,
            server=None,
            send=self._on_event,
        )
        self._client = connection
        self._spawn = spawn
        # Of the request that is being answered.
        self._inbox: _Inbox | None = None
        # Lines of the head that h11 writes next.
        self._lines = b""
        self._buffer = strict_parser.strict_buffer(self.connection)  # type: ignore[arg-type]

    async def handle(self, event: Event) -> None:
        if not (isinstance(event, RawData) and strict_parser.is_last(self.connection)):  # type: ignore[arg-type]
            await super().handle(event)

    def forget(self) -> None:
        """Drop the bytes that were not read. The objects of a connection are garbage for a while."""
        self._buffer.clear()

    async def spawn_app(self, app: None, config: Config, scope: Scope, send: Send) -> Any:
        inbox = self._inbox = _Inbox(partial(self._begin_answer, scope["http_version"]))
        own = {WHEN_GONE: inbox.when_gone, REFUSED: lambda: inbox.refused}
        scope["extensions"] = {**scope.get("extensions", {}), **own}
        self._spawn(scope, inbox.receive, send)
        return inbox.put

    def _begin_answer(self, http_version: str) -> None:
        """The request is whole. After the last one of a connection nothing more is read."""
        if strict_parser.is_last(self.connection):  # type: ignore[arg-type]
            self._buffer.clear()
        can_probe = http_version == "1.1" and strict_parser.is_answer_due(self.connection)  # type: ignore[arg-type]
        self._client.begin_answer(CONTINUE if can_probe else b"")

    async def stream_send(self, event: Any) -> None:
        if isinstance(event, (Response, EndBody)):
            self._client.probe.data = b""
        if isinstance(event, EndBody) and self._inbox is not None:
            # Hypercorn reports a disconnection also after the end.
            self._inbox.when_gone(None)
            self._inbox = None
        if isinstance(event, Response):
            framing = [each for each in event.headers if each[0] in FRAMING]
            self._lines = header_lines(each for each in event.headers if each[0] not in FRAMING)
            if not strict_parser.is_request_whole(self.connection):  # type: ignore[arg-type]
                # The rest of the request will not be read.
                framing.append((b"connection", b"close"))
            event = replace(event, headers=framing)
        await super().stream_send(event)

    async def _on_event(self, event: Event) -> None:
        match event:
            case RawData(data=data):
                if self._lines:
                    status, _, rest = data.partition(b"\r\n")
                    data = b"%b\r\n%b%b" % (status, self._lines, rest)
                    self._lines = b""
                await self._client.write(data)
            case Updated(idle=True):
                self._client.end_answer()
            case Updated():
                self._client.begin_body()
            case Closed():
                self._client.close()

    async def _check_protocol(self, event: Any) -> None:
        """Refuse what is not HTTP/1.1. An offer of HTTP/2 (`Upgrade: h2c`) is ignored."""
        if event.http_version not in (b"1.0", b"1.1"):
            self._refuse(505)
            raise _Refused
        if problem := strict_parser.request_problem(event):
            self._buffer.problem = problem
            self._refuse(400)
            raise _Refused
        # Hypercorn would change to its WebSocket stream.
        if any(name == b"upgrade" and value.strip().lower() == b"websocket" for name, value in event.headers):
            self._client.refuse(HTTPError(400, WEBSOCKET, code="websocket_unsupported"))
            raise _Refused

    async def _send_error_response(self, status_code: int) -> None:
        self._refuse(status_code)

    def _refuse(self, status: int) -> None:
        code, message = REFUSALS.get(status, REFUSALS[400])
        if code == "malformed_http" and self._buffer.problem:
            message = f"{message}: {self._buffer.problem}"
        error = HTTPError(status, message, code=code)
        if self._inbox is not None:
            self._inbox.refused = error
        self._client.refuse(error, to_app=self._inbox is not None)


class _Inbox:
    """The messages to one request. Unlike a queue it is bounded by bytes, and a body that the app does not
    read cannot delay the end of the connection. It calls `arrived` when the body is whole. `refused` is the
    error with which the server answered the request, if it did."""

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived
        self.refused: HTTPError | None = None
        self._body = bytearray()
        self._chunks = 0
        self._is_whole = self._is_read = False
        self._is_gone = False
        self._gone: Callable[[], None] | None = None
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, message: Mapping[str, Any]) -> None:
        """Add a message, and wait while the app has too many bytes to read."""
        if message["type"] == "http.disconnect":
            self._is_gone = True
            if self._gone is not None:
                self._gone()
        else:
            self._body += message["body"]
            self._is_whole = not message["more_body"]
            if self._is_whole:
                self._arrived()
        self._changed.set()
        self._chunks += 1
        if self._chunks % CHUNKS == 0:
            await asyncio.sleep(0)
        if len(self._body) > BODY_BYTES and not self._is_gone:
            self._room.clear()
            await self._room.wait()

    def when_gone(self, call: Callable[[], None] | None) -> None:
        """Call a function once the client has left; at once if it has. None: call no function any more."""
        self._gone = call
        if call is not None and self._is_gone:
            call()

    async def receive(self) -> dict[str, Any]:
        """Return the body's next bytes. If the client has left, return them only if the body is whole."""
        while True:
            has_more = bool(self._body) or (self._is_whole and not self._is_read)
            if has_more and (self._is_whole or not self._is_gone):
                data, self._body = bytes(self._body), bytearray()
                self._is_read = self._is_whole
                self._room.set()
                return {"type": "http.request", "body": data, "more_body": not self._is_whole}
            if self._is_gone:
                return {"type": "http.disconnect"}
            self._changed.clear()
            await self._changed.wait()


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers as lines of a head. Raises ValueError for a control character in one.

    h11 would check each name and value four times, which takes 30 microseconds an answer.
    """
    headers = list(headers)
    if _CONTROL.search(b"".join(chain.from_iterable(headers))):
        names = b", ".join(name for name, _ in headers).decode("latin-1")
        raise ValueError(f"a control character in a header of {names}")
    return b"".join([b"%b: %b\r\n" % each for each in headers])


def probe_setter(connection: ClientConnection) -> SetProbe:
    """Return a function that sets the probe of a connection to a chunk. Call it as a chunk writer."""

    def set_probe(data: bytes) -> None:
        connection.probe.data = chunk(data)

    return set_probe


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunk_writer(connection: ClientConnection, scope: Scope) -> WriteChunk | None:
    """Return a function that writes a chunk to the socket, or returns False if the client is slow.

    Between a message and the socket, hypercorn makes a dozen calls and three awaits; for an answer of many
    small chunks that is most of the work. Return None if the response is not chunked. Call the function only
    after the head of the response was sent.
    """
    if scope["http_version"] != "1.1" or scope["method"] == "HEAD":
        return None
    return lambda data: connection.write_now(chunk(data))
