"""Hypercorn as the gateway runs it. No other module imports it."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.protocol.h11 import H11Protocol

from rift.gateway.asgi.request import WRITE_CHUNK, Scope, Send, WriteChunk

# How long an idle connection is kept: shorter than the limit of any proxy.
KEEP_ALIVE_S = 75

# The gateway ends its streams before the server stops, so the server cuts the rest soon.
GRACEFUL_S = 2

# The size of a connection's buffer from which a writer waits: asyncio's default.
WRITE_BUFFER_BYTES = 64 * 1024

# Connections that may wait to be accepted while the loop is busy.
BACKLOG = 1024


async def serve(app: Any, *, host: str, port: int, stopped: Callable[[], Awaitable[None]]) -> None:
    """Serve until `stopped` returns. `read_timeout` stays unset: it would cut streams."""

    async def with_chunks(scope: Any, receive: Any, send: Any) -> None:
        if (write := chunk_writer(scope, send)) is not None:
            scope["extensions"] = {**scope.get("extensions", {}), WRITE_CHUNK: write}
        await app(scope, receive, send)

    config = Config()
    config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.graceful_timeout = GRACEFUL_S
    config.shutdown_timeout = GRACEFUL_S
    config.backlog = BACKLOG
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    # In its own task, because hypercorn cancels the task that called it.
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(hypercorn_serve, with_chunks, config, shutdown_trigger=stopped, mode="asgi"))


def chunk_writer(scope: Scope, send: Send) -> WriteChunk | None:
    """Return a function that writes a chunk to the socket, or returns False if the client is slow.

    Between a message and the socket, hypercorn makes a dozen calls and three awaits in a task of its own;
    for an answer of many small chunks that is most of the work. Return None if the response is not chunked.
    Call the function only after the head of the response was sent.
    """
    protocol = getattr(getattr(getattr(send, "__self__", None), "send", None), "__self__", None)
    if not isinstance(protocol, H11Protocol) or scope["http_version"] != "1.1" or scope["method"] == "HEAD":
        return None
    connection = getattr(getattr(protocol.send, "__self__", None), "writer", None)
    if connection is None:
        return None
    transport = connection.transport

    def write(data: bytes) -> bool:
        if transport.is_closing() or transport.get_write_buffer_size() > WRITE_BUFFER_BYTES:
            return False
        try:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        except (RuntimeError, OSError):
            # The connection's own task notices that it is closed; the lane's reader must not fail.
            return False
        return True

    return write
