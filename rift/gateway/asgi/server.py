"""Hypercorn, as the gateway runs it: the only door to it."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.protocol.h11 import H11Protocol

from rift.gateway.asgi.request import WRITE_CHUNK, Scope, Send, WriteChunk

# Between two requests of one client; shorter than any proxy's own.
KEEP_ALIVE_S = 75

# The streams are ended before the server is told to stop: what is left then is cut.
GRACEFUL_S = 2

# What may wait in a connection's buffer: asyncio's own mark from which a writer has to wait.
WRITE_BUFFER_BYTES = 64 * 1024

# Connections that wait to be accepted while the loop is busy.
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
    # In a task of its own: hypercorn leaves the task that called it with a cancellation of its own making.
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(hypercorn_serve, with_chunks, config, shutdown_trigger=stopped, mode="asgi"))


def chunk_writer(scope: Scope, send: Send) -> WriteChunk | None:
    """Return what writes a chunk of a response whose head was sent, or says False if its client is behind.

    From a message to the socket hypercorn makes a dozen calls and three awaits, in a task that has to be
    woken for it; an answer of many small chunks is little else. None where a response is not of chunks.
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
            # A closed connection is the affair of its own task, not of all others' reader.
            return False
        return True

    return write
