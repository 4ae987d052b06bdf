"""The server over real sockets: HTTP/1.1 only, direct writes, and what each client may hold for how long."""

import contextlib
import gc
import json
import logging
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from inspect import iscoroutinefunction, signature
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from hypercorn.protocol import h11

from rift import gateway
from rift.gateway.asgi import connections as module
from rift.gateway.asgi import strict_parser
from rift.gateway.asgi.connections import Connections
from rift.gateway.asgi.request import PROBE, WRITE_CHUNK
from rift.gateway.asgi.server import CONTINUE, serve
from rift.gateway.asgi.strict_parser import HEAD_BYTES, HEAD_LINES
from tests.chaos.rig import free_port

pytestmark = pytest.mark.anyio

WAIT = b"GET /wait HTTP/1.1\r\nHost: rift\r\n\r\n"
HEAD = b"GET / HTTP/1.1\r\nHost: rift\r\n\r\n"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """The loop of the gateway."""
    return "asyncio", {"use_uvloop": True}


class App:
    """Answer with two chunks, the first directly if possible, and record which path it took."""

    def __init__(self) -> None:
        self.wrote: list[bool | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        write = scope.get("extensions", {}).get(WRITE_CHUNK)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if write is None:
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
        self.wrote.append(None if write is None else write(b"first"))
        await send({"type": "http.response.body", "body": b" last", "more_body": False})
        if write is not None:
            while write(b"after the end"):  # noqa: ASYNC110  # until the connection is closed
                await anyio.sleep(0.01)


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


# --- the direct path to the socket ---------------------------------------------------------------------


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
    async with serving(app) as running:
        found = await answer(running.port, b"GET / HTTP/1.1")
    assert app.wrote == [True]
    assert b"transfer-encoding: chunked" in found.lower()
    assert found.partition(b"\r\n\r\n")[2].startswith(b"5\r\nfirst\r\n5\r\n last\r\n")


async def test_a_response_without_chunks_goes_through_the_server() -> None:
    app = App()
    async with serving(app) as running:
        found = await answer(running.port, b"GET / HTTP/1.0")
    assert app.wrote == [None]
    assert found.endswith(b"first last")


# --- hypercorn -----------------------------------------------------------------------------------------


def test_hypercorn_is_the_version_that_the_server_was_written_for() -> None:
    """The server overrides and calls what hypercorn does not document."""
    assert version("hypercorn").startswith("0.18."), (
        test_hypercorn_is_the_version_that_the_server_was_written_for.__doc__
    )
    assert list(signature(h11.H11Protocol).parameters) == [
        "app", "config", "context", "task_group", "connection_state", "ssl", "client", "server", "send",
    ]  # fmt: skip
    for name in ("_check_protocol", "_send_error_response"):
        method = getattr(h11.H11Protocol, name, None)
        assert iscoroutinefunction(method), f"the server overrides H11Protocol.{name}, which is gone"


# --- closed connections --------------------------------------------------------------------------------


async def test_a_closed_connection_is_released_at_once() -> None:
    async with serving(Paths()) as running:
        silent = await running.connect()
        idle = await running.connect(HEAD)
        assert await is_answered(idle)
        reset = await running.connect(HEAD)
        await reset.receive()
        await until(lambda: running.connections.open == 3)
        await silent.aclose()
        await idle.aclose()
        send_reset(reset)
        await until(lambda: running.connections.open == 0, 1)


def send_reset(stream: SocketStream) -> None:
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream._transport.abort()  # type: ignore[attr-defined]


@pytest.mark.parametrize("pipelined", [b"", HEAD * 3, b"GET / HT"])
async def test_a_request_learns_at_once_that_its_client_left(pipelined: bytes) -> None:
    app = Paths()
    async with serving(app) as running:
        for path in (b"/wait", b"/stream"):
            head = b"GET %b HTTP/1.1\r\nHost: rift\r\n\r\n" % path
            app.begun = app.gone = 0
            stream = await running.connect(head + pipelined)
            await until(lambda: app.begun == 1)
            await stream.aclose()
            await until(lambda: app.gone == 1, 3)
            await until(lambda: running.connections.open == 0, 3)
            assert app.begun == 1


async def test_a_request_is_handled_though_its_client_closes_at_once() -> None:
    """Its body is whole, so it may be a request that needs no client."""
    app = Paths()
    async with serving(app) as running:
        request = b"POST /body HTTP/1.1\r\nHost: rift\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
        await (await running.connect(request)).aclose()
        await until(lambda: app.bodies == [b"x" * 100_000])
        await (await running.connect(request[:-1])).aclose()
        await until(lambda: app.gone == 1)


@pytest.mark.parametrize("path", [b"/", b"/unread"])
async def test_a_body_that_is_not_read_does_not_hold_the_connection(path: bytes) -> None:
    async with serving(Paths()) as running:
        head = b"POST %b HTTP/1.1\r\nHost: rift\r\nContent-Length: 4000000\r\n\r\n" % path
        async with await running.connect(head + b"x" * 1_000_000) as stream:
            found = await rest(stream)
        assert found.endswith(b"ok")
        assert b"\r\nconnection: close\r\n" in found
        await until(lambda: running.connections.open == 0)


async def test_a_body_of_tiny_chunks_arrives_whole_and_in_turns() -> None:
    """Its chunks would otherwise keep the loop busy until everything that has arrived is read."""
    app = Paths()
    async with serving(app) as running:
        head = b"POST /body HTTP/1.1\r\nHost: rift\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        found = await running.ask(head + b"1\r\nx\r\n" * 20_000 + b"0\r\nA: b\r\n\r\n")
    assert found.endswith(b"ok")
    assert app.bodies == [b"x" * 20_000]
    assert app.largest < 1000


# --- clients that close their side ---------------------------------------------------------------------


LATER = HEAD.replace(b"GET /", b"GET /later")


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("request_", "interim"),
    [
        (LATER, CONTINUE),
        (LATER * 3, CONTINUE),
        (LATER.replace(b"1.1", b"1.0"), b""),
        (b"POST /later HTTP/1.1\r\nHost: rift\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000, CONTINUE),
        (b"POST /early HTTP/1.1\r\nHost: rift\r\nContent-Length: 1\r\n\r\nx", b""),
        (HEAD.replace(b"GET /", b"GET /chunks"), b"5\r\nprobe\r\n"),
    ],
)
async def test_a_client_that_closes_its_side_gets_its_answers(request_: bytes, interim: bytes) -> None:
    app = Paths()
    async with serving(app) as running:
        stream = await running.connect(request_[:-1])
        await anyio.sleep(0.1)
        await stream.send(request_[-1:])
        await stream.send_eof()
        found = await rest(stream)
        for each in (CONTINUE, b"5\r\nprobe\r\n"):
            assert (each in found) == (each == interim)
        answers = found.replace(interim, b"").replace(b"2\r\nok\r\n0\r\n\r\n", b"ok").split(b"HTTP/1.")[1:]
        assert all(b" 200 " in answer and answer.endswith(b"\r\n\r\nok") for answer in answers)
        assert len(answers) == app.begun == max(1, request_.count(b"GET"))
        await until(lambda: running.connections.open == 0, 1)


@pytest.mark.usefixtures("hurried")
async def test_no_interim_answer_follows_the_head_of_an_answer() -> None:
    async with serving(Paths()) as running:
        stream = await running.connect(HEAD.replace(b"GET /", b"GET /early"))
        assert (await stream.receive()).startswith(b"HTTP/1.1 200")
        await stream.send_eof()
        assert await rest(stream) == b"ok"


@pytest.mark.usefixtures("hurried")
async def test_a_client_that_waits_long_gets_few_interim_answers() -> None:
    async with serving(Paths()) as running:
        stream = await running.connect(WAIT)
        await stream.send_eof()
        found = b""
        with anyio.move_on_after(1):
            while True:
                found += await stream.receive()
        assert found.count(CONTINUE) in range(1, 8), "twenty checks were made"


async def test_a_client_that_closes_its_side_and_later_leaves_is_noticed() -> None:
    app = Paths()
    async with serving(app) as running:
        stream = await running.connect(WAIT)
        await stream.send_eof()
        assert (await stream.receive()) == CONTINUE
        assert app.gone == 0
        await stream.aclose()
        await until(lambda: app.gone == 1, 3)
        await until(lambda: running.connections.open == 0, 1)


async def test_an_incomplete_request_ends_when_its_client_closes_its_side() -> None:
    app = Paths()
    async with serving(app) as running:
        for request in (b"", b"GET", BODY + b"12"):
            stream = await running.connect(request)
            await stream.send_eof()
            assert await rest(stream) == b""
        await until(lambda: running.connections.open == 0, 1)
    assert app.gone == app.begun == 1


async def test_connections_that_have_ended_leave_nothing() -> None:
    async with serving(Paths()) as running:

        async def blocks() -> int:
            for _ in range(100):
                assert (await running.ask(HEAD[:-2] + b"Connection: close\r\n\r\n")).endswith(b"ok")
            running.streams.clear()
            await until(lambda: running.connections.open == 0)
            await anyio.sleep(0.05)
            gc.collect()
            return sys.getallocatedblocks()

        await blocks()
        before = await blocks()
        assert await blocks() - before < 100


# --- deadlines -----------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_S", 0.4)
    monkeypatch.setattr(module, "WRITE_S", 0.6)
    monkeypatch.setattr(module, "CHECK_S", 0.05)
    monkeypatch.setattr(module, "LINGER_S", 0.3)


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


@contextlib.contextmanager
def small_buffers(port: int) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.settimeout(5)
        client.connect(("127.0.0.1", port))
        yield client


# --- the number of connections -------------------------------------------------------------------------


async def test_at_the_limit_the_longest_wait_ends_first(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S_MIN", 0)
    caplog.set_level(logging.WARNING)
    app = Paths()
    async with serving(app, limit=3) as running:
        await running.connect(WAIT)
        await until(lambda: app.begun == 1)
        silent = await running.connect()
        await until(lambda: running.connections.open == 2)
        idle = await running.connect(HEAD)
        assert await is_answered(idle)
        newest = await running.connect(HEAD)
        assert await is_answered(newest)
        assert await rest(silent) == b""
        await idle.send(HEAD)
        assert await is_answered(idle)
        later = [await running.connect(HEAD) for _ in range(5)]
        assert await is_answered(later[-1])
        assert running.connections.open == 3
        assert app.gone == 0
    assert len(caplog.records) == 1
    assert "all 3 connections are in use" in caplog.text


BODY = b"POST /body HTTP/1.1\r\nHost: rift\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize(
    "request_", [BODY, BODY + b"12", b"GET /9000000 HTTP/1.1\r\nHost: rift\r\n\r\n" * 5000]
)
async def test_at_the_limit_clients_that_do_nothing_give_way(
    request_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need no key to send half a body, or to read nothing."""
    monkeypatch.setattr(module, "WAIT_S_MIN", 0)
    app = Paths()
    async with serving(app, limit=2) as running:
        await running.connect(WAIT)
        stuck = await running.connect(request_)
        await until(lambda: app.begun == 2)
        await anyio.sleep(0.1)
        newest = await running.connect(BODY + b"123")
        assert await is_answered(newest)
        assert running.connections.open == 2
        await rest(stuck)


async def test_a_connection_is_refused_if_all_others_have_requests() -> None:
    app = Paths()
    async with serving(app, limit=2) as running:
        busy = [await running.connect(WAIT) for _ in range(2)]
        await until(lambda: app.begun == 2)
        found = await running.ask(HEAD)
        assert error(found) == (503, "too_many_connections")
        assert b"\r\nretry-after: 2\r\n" in found
        await busy.pop().aclose()
        await until(lambda: running.connections.open == 1)
        async with await running.connect(HEAD) as stream:
            assert await is_answered(stream)


async def test_every_connection_of_a_burst_is_answered() -> None:
    """Many are accepted before the first is read."""
    async with serving(Paths(), limit=40) as running, contextlib.AsyncExitStack() as stack:
        burst: list[socket.socket] = []
        for _ in range(7):
            burst.extend(stack.enter_context(connect(running.port)) for _ in range(10))
            await until(lambda: running.connections.open == len(burst))
        for client in burst:
            client.sendall(HEAD)
        answers = [await anyio.to_thread.run_sync(client.recv, 10_000) for client in burst]
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 200", b"HTTP/1.1 503"}


async def test_a_request_that_arrives_with_a_new_connection_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WAIT_S_MIN", 0)
    async with serving(Paths(), limit=1) as running, contextlib.AsyncExitStack() as stack:
        idle = stack.enter_context(connect(running.port))
        idle.sendall(HEAD)
        assert await anyio.to_thread.run_sync(idle.recv, 10_000)
        # The loop does not run between these two.
        newest = stack.enter_context(connect(running.port))
        idle.sendall(HEAD)
        assert (await anyio.to_thread.run_sync(idle.recv, 10_000)).startswith(b"HTTP/1.1 200")
        assert (await anyio.to_thread.run_sync(newest.recv, 10_000)).startswith(b"HTTP/1.1 503")


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize(("limit", "waiting"), [(2, 1), (768, 192), (8192, 1024)])
def test_the_loop_accepts_few_connections_at_once(limit: int, waiting: int) -> None:
    assert module.backlog(limit) == waiting


async def test_the_refused_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFUSED_MAX", 3)
    app = Paths()
    async with serving(app, limit=1) as running:
        await running.connect(WAIT)
        await until(lambda: app.begun == 1)
        for _ in range(10):
            await running.connect()
        await anyio.sleep(0.1)
        assert running.connections.open <= 4


def test_the_limit_is_below_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr(module.resource, "setrlimit", lambda _, limits: raised.append(limits))
    for hard, most in ((1024, 768), (300, 150), (10**6, 8192), (module.resource.RLIM_INFINITY, 8192)):
        monkeypatch.setattr(module.resource, "getrlimit", lambda _, hard=hard: (256, hard))
        assert module.connections_max() == most
        assert raised.pop() == (hard, hard)


# --- HTTP/1.1 only -------------------------------------------------------------------------------------

WEBSOCKET = (
    b"GET /v1/inference HTTP/1.1\r\nHost: rift\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505, "http_version"),
        (b"GET / HTTP/9.9\r\nHost: rift\r\n\r\n", 505, "http_version"),
        (WEBSOCKET, 400, "websocket_unsupported"),
        (WEBSOCKET.replace(b"websocket\r\n", b"WebSocket\r\n"), 400, "websocket_unsupported"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nA: " + b"x" * 2 * HEAD_BYTES, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\n" + b"a: b\r\n" * HEAD_BYTES, 431, "headers_too_large"),
        (HEAD[:-2] + b"A: " + b"x" * HEAD_BYTES + b"\r\n\r\n", 431, "headers_too_large"),
        (HEAD[:-2] + b"a:\r\n" * HEAD_LINES + b"\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "encoding_unsupported"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed_http"),
        (b"POST /body HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400, "malformed_http"),
    ],
)
async def test_other_protocols_are_refused_in_the_form_of_errors(
    request_: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Paths()
    async with serving(app) as running:
        assert error(await running.ask(request_)) == (status, code)
        await until(lambda: running.connections.open == 0)
    assert app.gone == app.begun
    assert not caplog.records


POST = b"POST /body HTTP/1.1\r\nHost: rift\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n", "not both"),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "not both"),
        (POST + b"Content-Length: 5, 5\r\n\r\nhello", "one number"),
        (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "one header content-length"),
        (POST + b"Content-Length: +5\r\n\r\nhello", "one number"),
        (
            HEAD[:-2] + b"Authorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n",
            "one header authorization",
        ),
        (HEAD[:-2] + b"Host: other\r\n\r\n", "one header host"),
        (HEAD[:-2] + b"Idempotency-Key: a\r\nIdempotency-Key: a\r\n\r\n", "one header idempotency-key"),
        (HEAD.replace(b"\r\n", b"\n"), "CR LF"),
        (b"GET / HTTP/1.1\r\nHost: rift\nA: b\r\n\r\n", "CR LF"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nA: b\rC: d\r\n\r\n", "CR LF"),
        (b"GET / HTTP/1.1\r\nHost: rift\r\nA: b\r\n c\r\n\r\n", "continue another"),
        (b"GET / HTTP/1.1\r\nHost : rift\r\n\r\n", "before its colon"),
        (HEAD[:-2] + b"Idempotency-Key: \xc3\xa4\r\n\r\n", "ASCII"),
        (HEAD[:-2] + b"Connection: upgrade\r\nUpgrade: \xa0websocket\r\n\r\n", "ASCII"),
        (HEAD.replace(b" / ", b" /\xc3\xa4 "), "ASCII"),
        (HEAD[:-2] + b"A: b\x00\r\n\r\n", "control characters"),
        (b"GET http://rift/ HTTP/1.1\r\nHost: rift\r\n\r\n", "begins with /"),
        (b"OPTIONS * HTTP/1.1\r\nHost: rift\r\n\r\n", "begins with /"),
        (b"CONNECT rift:80 HTTP/1.1\r\nHost: rift\r\n\r\n", "begins with /"),
        (b"get / HTTP/1.1\r\nHost: rift\r\n\r\n", "upper case"),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.0"),
        (CHUNKED + b"\r\n5;a=b\r\nhello\r\n0\r\n\r\n", "first line"),
        (CHUNKED + b"\r\n5 \r\nhello\r\n0\r\n\r\n", "first line"),
        (CHUNKED + b"\r\n5\nhello\r\n0\r\n\r\n", "first line"),
        (CHUNKED + b"\r\n5\r\nhello\r\n0\r\nA: b\n\r\n", "CR LF"),
    ],
)
async def test_what_two_parsers_could_read_differently_is_refused(request_: bytes, problem: str) -> None:
    app = Paths()
    async with serving(app) as running:
        found = await running.ask(request_ + HEAD)
        assert error(found) == (400, "malformed_http")
        assert problem in found.decode()
        await until(lambda: app.begun == app.gone)
    assert not app.bodies


async def test_a_header_that_is_not_read_may_have_bytes_beyond_ascii() -> None:
    async with serving(Paths()) as running:
        assert await is_answered(await running.connect(HEAD[:-2] + b"Cookie: name=J\xc3\xbcrgen\r\n\r\n"))


def test_every_header_that_is_read_may_occur_once() -> None:
    source = "".join(path.read_text() for path in Path(next(iter(gateway.__path__))).rglob("*.py"))
    read_ = set(re.findall(r"\.header\(b\"([\w-]+)\"\)", source))
    assert len(read_) > 5
    assert not read_ - {name.decode() for name in strict_parser.SINGLE}


async def test_an_offer_of_http2_is_ignored() -> None:
    async with serving(Paths()) as running:
        head = b"GET / HTTP/1.1\r\nHost: rift\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        async with await running.connect(head + b"HTTP2-Settings: AAMAAABk\r\n\r\n" + HEAD) as stream:
            found = await read(stream, 2)
            with anyio.fail_after(5):
                while found.count(b"ok") < 2:
                    found += await stream.receive()
    assert found.count(b"HTTP/1.1 200") == 2
    assert b"101" not in found


async def test_a_crash_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Paths()) as running:
        crashed = await running.ask(b"GET /crash HTTP/1.1\r\nHost: rift\r\n\r\n")
        assert error(crashed) == (500, "internal_error")
    assert "GET /crash failed" in caplog.text


# --- the end -------------------------------------------------------------------------------------------


async def test_the_server_stops_soon_with_idle_and_silent_clients() -> None:
    async with serving(Paths()) as running:
        streams = [await running.connect(), await running.connect(HEAD)]
        await streams[1].receive()
        running.streams.clear()
        began_s = anyio.current_time()
    assert anyio.current_time() < began_s + 1
    for each in streams:
        await each.aclose()


async def test_no_connection_outlives_a_server_that_is_cancelled() -> None:
    """A socket with unread bytes would keep the loop from ending."""
    with anyio.CancelScope() as scope:
        async with serving(Paths()) as running:
            await running.connect(b"GET /9000000 HTTP/1.1\r\nHost: rift\r\n\r\n")
            await until(lambda: running.connections.open == 1)
            await anyio.sleep(0.1)
            scope.cancel()
            await anyio.sleep_forever()
    assert running.connections.open == 0
    await running.streams[-1].aclose()
    await anyio.sleep(0.01)
