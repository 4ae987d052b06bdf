"""The direct path to the socket past hypercorn: when it exists, and its order of writes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from rift.gateway.asgi.request import WRITE_CHUNK
from rift.gateway.asgi.server import serve
from tests.chaos.rig import free_port

pytestmark = pytest.mark.anyio


class App:
    """Answer with two chunks, the first directly if possible, and record which path it took."""

    def __init__(self) -> None:
        self.wrote: list[bool | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        write = scope.get("extensions", {}).get(WRITE_CHUNK)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if write is None:
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
        self.wrote.append(None if write is None else write(b"first"))
        await send({"type": "http.response.body", "body": b" last", "more_body": False})
        if write is not None:
            while write(b"after the end"):  # noqa: ASYNC110  # until the connection is closed
                await anyio.sleep(0.01)


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[int]:
    port = free_port()
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await serve(app, host="127.0.0.1", port=port, stopped=stop.wait)

        tasks.start_soon(run)
        with anyio.fail_after(5):
            while True:
                try:
                    await (await anyio.connect_tcp("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await anyio.sleep(0.02)
        yield port
        stop.set()


async def answer(port: int, head: bytes) -> bytes:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(head + b"\r\nHost: rift\r\nConnection: close\r\n\r\n")
        found = b""
        with anyio.move_on_after(2):
            while b" last" not in found:
                found += await stream.receive()
    return found


async def test_a_chunk_is_written_directly_and_in_order() -> None:
    app = App()
    async with serving(app) as port:
        found = await answer(port, b"GET / HTTP/1.1")
    assert app.wrote == [True]
    assert b"transfer-encoding: chunked" in found.lower()
    assert found.partition(b"\r\n\r\n")[2].startswith(b"5\r\nfirst\r\n5\r\n last\r\n")


async def test_a_response_without_chunks_goes_through_the_server() -> None:
    app = App()
    async with serving(app) as port:
        found = await answer(port, b"GET / HTTP/1.0")
    assert app.wrote == [None]
    assert found.endswith(b"first last")
