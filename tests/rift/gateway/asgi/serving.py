"""A server on a free port, an application that answers by the path, and clients that read bytes."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
from anyio.abc import SocketStream

from rift.gateway.asgi.connections import Connections
from rift.gateway.asgi.request import PROBE
from rift.gateway.asgi.server import serve
from tests.chaos.rig import free_port

WAIT = b"GET /wait HTTP/1.1\r\nHost: rift\r\n\r\n"
HEAD = b"GET / HTTP/1.1\r\nHost: rift\r\n\r\n"
BODY = b"POST /body HTTP/1.1\r\nHost: rift\r\nContent-Length: 3\r\n\r\n"


class Paths:
    """Answer by the path: `/` at once, `/9` with 9 bytes, `/wait` when the client leaves, `/stream` for ever.

    `gone` counts the requests whose client left before its answer, `bodies` holds the bodies, and `largest`
    is the size of the largest part of one.
    """

    def __init__(self) -> None:
        self.begun = self.gone = self.largest = 0
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        path = scope["path"]
        if path in ("/body", "/later", "/wait"):
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.gone += 1
                    return
                body, more = body + message["body"], message["more_body"]
                self.largest = max(self.largest, len(message["body"]))
            self.bodies.append(body)
        if path == "/wait":
            assert (await receive())["type"] == "http.disconnect"
            self.gone += 1
            return
        if path in ("/later", "/unread"):
            await anyio.sleep(0.2)
        if path in ("/early", "/chunks"):
            return await self._slowly(scope, receive, send)
        if path == "/crash":
            raise ValueError("crash")
        data = b"x" * int(path[1:]) if path[1:].isdigit() else b"ok"
        length = [] if path == "/stream" else [(b"content-length", b"%d" % len(data))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        if path == "/stream":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stream, send)
                assert (await receive())["type"] == "http.request"
                assert (await receive())["type"] == "http.disconnect"
                self.gone += 1
                tasks.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": data, "more_body": False})

    async def _slowly(self, scope: Any, receive: Any, send: Any) -> None:
        """Begin the answer before the request is read, and end it later."""
        length = [(b"content-length", b"2")] if scope["path"] == "/early" else []
        await send({"type": "http.response.start", "status": 200, "headers": length})
        if not length:
            scope["extensions"][PROBE](b"probe")
        while (await receive())["more_body"]:
            pass
        await anyio.sleep(0.2)
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})

    async def _stream(self, send: Any) -> None:
        while True:
            await send({"type": "http.response.body", "body": b"." * 5000, "more_body": True})
            await anyio.sleep(0.001)


class Serving:
    def __init__(self, port: int, connections: Connections) -> None:
        self.port = port
        self.connections = connections
        self.streams: list[SocketStream] = []

    async def connect(self, head: bytes = b"") -> SocketStream:
        stream = await anyio.connect_tcp("127.0.0.1", self.port)
        self.streams.append(stream)
        if head:
            await stream.send(head)
        return stream

    async def ask(self, request: bytes) -> bytes:
        """Return everything until the server closes."""
        async with await self.connect(request) as stream:
            return await rest(stream)


@asynccontextmanager
async def serving(app: Any, limit: int = 100) -> AsyncIterator[Serving]:
    port = free_port()
    stop = anyio.Event()
    connections = Connections(limit)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(serve, app, connections, host="127.0.0.1", port=port, stopped=stop.wait))
        running = Serving(port, connections)
        with anyio.fail_after(5):
            while True:
                with contextlib.suppress(OSError):
                    await (await running.connect()).aclose()
                    break
                await anyio.sleep(0.02)
        await until(lambda: connections.open == 0)
        yield running
        stop.set()
        for stream in running.streams:
            await stream.aclose()


async def until(holds: Callable[[], bool], within_s: float = 5) -> None:
    with anyio.fail_after(within_s):
        while not holds():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def is_answered(stream: SocketStream) -> bool:
    with anyio.fail_after(5):
        return (await stream.receive()).endswith(b"ok")


async def rest(stream: SocketStream) -> bytes:
    found = b""
    with anyio.fail_after(5), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            found += await stream.receive()
    return found


async def read(stream: SocketStream, size: int) -> bytes:
    found = b""
    with anyio.fail_after(5):
        while len(found) < size:
            found += await stream.receive(size - len(found))
    return found


def error(answer: bytes) -> tuple[int, str]:
    """Return the status and the code of an error answer after which the connection was closed."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    assert f"content-length: {len(body)}".encode() in head
    found = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return int(head.split()[1]), found["code"]
