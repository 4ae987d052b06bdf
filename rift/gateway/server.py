"""Hypercorn, as the gateway runs it: the only door to it."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config

# Between two requests of one client; shorter than any proxy's own.
KEEP_ALIVE_S = 75

# The streams are ended before the server is told to stop: what is left then is cut.
GRACEFUL_S = 2

# Connections that wait to be accepted while the loop is busy.
BACKLOG = 1024


async def serve(app: Any, *, host: str, port: int, stopped: Callable[[], Awaitable[None]]) -> None:
    """Serve until `stopped` returns. `read_timeout` stays unset: it would cut streams."""
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
        tasks.start_soon(partial(hypercorn_serve, app, config, shutdown_trigger=stopped, mode="asgi"))
