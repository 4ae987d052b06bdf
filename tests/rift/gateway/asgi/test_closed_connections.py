"""Clients that leave, or close their side, at any point of a request."""

import gc
import socket
import struct
import sys

import anyio
import pytest
from anyio.abc import SocketStream

from rift.gateway.asgi.connections import ClientConnection
from rift.gateway.asgi.server import CONTINUE
from rift.gateway.asgi.strict_parser import StrictBuffer
from tests.rift.gateway.asgi.serving import BODY, HEAD, WAIT, Paths, is_answered, rest, serving, until

pytestmark = pytest.mark.anyio


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
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_what_follows_the_last_request_of_a_connection_is_not_read(version: bytes) -> None:
    """Scripts and old clients send a line end after a body, and may send more while they read."""
    app = Paths()
    last = b"POST /later HTTP/%b\r\nHost: rift\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with serving(app) as running, await running.connect(last % version + b"\r\n" + HEAD) as stream:
        await until(lambda: app.bodies == [b"ok"])
        await stream.send(b"\n" + HEAD)
        answer = await rest(stream)
    assert (answer.count(b"HTTP/1.1 200"), answer[-2:], app.begun) == (1, b"ok", 1)


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


async def test_a_closed_connection_keeps_no_bytes_until_it_is_collected() -> None:
    """The gateway looks for garbage rarely: the bytes of thousands of connections would wait for it."""
    beside = b"x" * 60_000
    gc.collect()
    gc.disable()
    try:
        async with serving(Paths()) as running:
            for request in (b"GET /" + beside, WAIT + beside * 2):
                stream = await running.connect(request)
                await anyio.sleep(0.1)
                await stream.aclose()
            await until(lambda: running.connections.open == 0, 3)
            await anyio.sleep(0.3)
            owners = [each for each in gc.get_objects() if type(each) in (ClientConnection, StrictBuffer)]
            kept = [each for each in gc.get_referents(*owners) if isinstance(each, bytearray)]
            assert len(owners) >= 4
            assert sum(map(len, kept)) < 1000
    finally:
        gc.enable()
