"""What a slow client may hold, and for how long."""

import contextlib
import socket
import tracemalloc
from collections.abc import Iterator

import anyio
import pytest
from anyio.abc import SocketStream

from rift.gateway.asgi import connections as module
from rift.gateway.asgi.request import Receive, Request, Scope, Send
from rift.gateway.exchange import Exchange
from tests.rift.gateway.asgi.serving import (
    HEAD,
    Paths,
    error,
    is_answered,
    read,
    rest,
    serving,
    until,
)

pytestmark = pytest.mark.anyio


@pytest.mark.usefixtures("hurried")
async def test_a_head_has_a_deadline_that_further_bytes_do_not_extend() -> None:
    async with serving(Paths()) as running:
        async with await running.connect() as silent, await running.connect(HEAD) as trickling:
            assert await is_answered(trickling)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(trickle, trickling)
                answer = await rest(trickling)
                tasks.cancel_scope.cancel()
            assert error(answer) == (408, "head_timeout")
            assert await rest(silent) == b""
        await until(lambda: running.connections.open == 0)


async def trickle(stream: SocketStream) -> None:
    await stream.send(b"GET / HTTP/1.1\r\nHost: rift\r\nA: ")
    with contextlib.suppress(OSError, anyio.BrokenResourceError):
        while True:
            await stream.send(b"b")
            await anyio.sleep(0.02)


@pytest.mark.usefixtures("hurried")
async def test_an_idle_connection_is_kept_longer_than_a_new_one() -> None:
    async with serving(Paths()) as running, await running.connect(HEAD) as idle:
        assert await is_answered(idle)
        await anyio.sleep(0.8)
        await idle.send(HEAD)
        assert await is_answered(idle)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("path", [b"/4000000", b"/stream"])
async def test_a_client_that_does_not_read_is_dropped(path: bytes) -> None:
    app = Paths()
    async with serving(app) as running:
        await running.connect(b"GET %b HTTP/1.1\r\nHost: rift\r\n\r\n" % path * 100)
        await until(lambda: running.connections.open == 1)
        await until(lambda: running.connections.open == 0)
    assert app.begun == 1


@pytest.mark.usefixtures("hurried")
async def test_a_client_that_reads_a_byte_now_and_then_is_dropped() -> None:
    async with serving(Paths()) as running:
        with small_buffers(running.port) as slow:
            slow.sendall(b"GET /4000000 HTTP/1.1\r\nHost: rift\r\n\r\n")
            with anyio.fail_after(5):
                await until(lambda: running.connections.open == 1)
                while running.connections.open:
                    with contextlib.suppress(ConnectionResetError):
                        await anyio.to_thread.run_sync(slow.recv, 1)
                    await anyio.sleep(0.02)


@pytest.mark.parametrize(
    ("read_bytes", "is_stuck"), [(module.WRITE_BYTES - 1, True), (module.WRITE_BYTES, False)]
)
def test_a_client_must_read_the_goal_within_its_time(read_bytes: int, is_stuck: bool) -> None:
    progress = module._Progress()
    progress.bytes = unread = 10 * module.WRITE_BYTES
    assert not progress.is_stuck(unread, now_s=1)
    unread -= read_bytes
    assert not progress.is_stuck(unread, now_s=1 + module.WRITE_S)
    assert progress.is_stuck(unread, now_s=2 + module.WRITE_S) == is_stuck


@pytest.mark.usefixtures("hurried")
async def test_a_slow_client_that_keeps_the_least_rate_gets_a_long_answer() -> None:
    async with serving(Paths()) as running:
        with small_buffers(running.port) as slow:
            slow.sendall(b"GET /1000000 HTTP/1.1\r\nHost: rift\r\nConnection: close\r\n\r\n")
            size, more = 0, True
            while more:
                more = bool(data := await anyio.to_thread.run_sync(slow.recv, 64 * 1024))
                size += len(data)
                # Much longer in total than the deadline, which holds for each 64 KB.
                await anyio.sleep(0.03)
    assert size > 1_000_000


async def test_the_bytes_that_no_client_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client with the most to read is closed, the others get their whole answers."""
    monkeypatch.setattr(module, "UNREAD_BYTES_MAX", 30_000_000)
    async with serving(Paths()) as running:
        streams = []
        for size in (10_000_000, 19_000_000, 10_000_000):
            streams.append(await running.connect(b"GET /%d HTTP/1.1\r\nHost: rift\r\n\r\n" % size))
            await anyio.sleep(0.2)
        await until(lambda: running.connections.open == 2)
        for stream in (streams[0], streams[2]):
            assert len(await read(stream, 10_000_000)) == 10_000_000
        assert await is_answered(await running.connect(HEAD))


async def test_only_the_connection_keeps_what_a_client_does_not_read() -> None:
    size = 20_000_000
    written = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send, own_id="one", exchange=Exchange(0))
        await request.start(200, b"text/event-stream")
        await request.write_part(bytes(size), more=True)
        written.set()
        await request.write_part(b"", more=False)

    async with serving(app) as running:
        tracemalloc.start()
        try:
            client = await running.connect(b"GET / HTTP/1.1\r\nHost: rift\r\n\r\n")
            with anyio.move_on_after(5):
                await written.wait()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept < 1.5 * size
        assert len(await read(client, size)) >= size


@contextlib.contextmanager
def small_buffers(port: int) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.settimeout(5)
        client.connect(("127.0.0.1", port))
        yield client
