"""The client without tasks between messages and socket, against a server that is scripted byte by byte."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import anyio
import nats.errors
import pytest

from events.jetstream.direct_client import UNSENT_BYTES_MAX, DirectClient, DirectReader
from events.jetstream.request_reply import subscribe

pytestmark = pytest.mark.anyio

INFO = b'INFO {"server_id":"s","version":"2.15.0","max_payload":8388608,"headers":true}\r\n'
DEADLINE_S = 5


class Server:
    """Accepts connections and answers their handshake. `sockets` has each one, `received` what came after."""

    def __init__(self) -> None:
        self.sockets: list[asyncio.StreamWriter] = []
        self.received = bytearray()
        self.reads = asyncio.Event()
        self.reads.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        while await reader.readline() != b"PING\r\n":
            pass
        writer.write(b"PONG\r\n")
        self.sockets.append(writer)
        await self.reads.wait()
        while data := await reader.read(65536):
            self.received += data
        writer.close()

    async def connected(self, count: int) -> asyncio.StreamWriter:
        with anyio.fail_after(DEADLINE_S):
            while len(self.sockets) < count:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        return self.sockets[-1]

    async def has_received(self, part: bytes) -> None:
        with anyio.fail_after(DEADLINE_S):
            while part not in self.received:  # noqa: ASYNC110
                await anyio.sleep(0.005)


@asynccontextmanager
async def connection(**options: Any) -> AsyncIterator[tuple[Server, DirectClient]]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    client = DirectClient()
    await client.connect(f"nats://127.0.0.1:{port}", reconnect_time_wait=0.01, **options)
    try:
        yield server, client
    finally:
        await client.close()
        listening.close()


async def is_read_directly(server: Server) -> asyncio.StreamWriter:
    """Return the last socket, once its client has read something and parses what comes next as it arrives."""
    socket = await server.connected(1)
    socket.write(b"PING\r\n")
    await server.has_received(b"PONG\r\n")
    await anyio.sleep(0.01)
    return socket


async def ignore(error: Exception) -> None:
    del error


async def test_a_message_is_parsed_however_its_bytes_arrive() -> None:
    taken: list[bytes] = []
    async with connection() as (server, client):
        await subscribe(client, "a.b", lambda message: taken.append(message.data))
        socket = await is_read_directly(server)
        assert isinstance(client._transport._io_reader, DirectReader)
        assert client._transport._io_reader._parse is not None, "no task stands between bytes and parser"
        server.received.clear()
        for at in range(len(sent := b"MSG a.b 1 5\r\nhello\r\nPING\r\nMSG a.b 1 2\r\nyo\r\n")):
            socket.write(sent[at : at + 1])
            await socket.drain()
            await anyio.sleep(0.001)
        await server.has_received(b"PONG\r\n")
        with anyio.fail_after(DEADLINE_S):
            while len(taken) < 2:  # noqa: ASYNC110
                await anyio.sleep(0.005)
    assert taken == [b"hello", b"yo"]


@pytest.mark.parametrize("end", [b"nonsense\r\n", b"-ERR 'Authorization Violation'\r\n"])
async def test_bytes_that_end_the_connection_are_followed_by_another_one(end: bytes) -> None:
    async with connection(error_cb=ignore) as (server, client):
        (await is_read_directly(server)).write(end)
        await server.connected(2)
        with anyio.fail_after(DEADLINE_S):
            while not client.is_connected:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        assert client.send(b"PUB after 0\r\n\r\n")
        await server.has_received(b"PUB after 0\r\n\r\n")


async def test_an_error_in_a_reader_is_logged_by_the_library(caplog: pytest.LogCaptureFixture) -> None:
    async with connection() as (server, client):
        await subscribe(client, "a", lambda message: message.nothing)
        (await is_read_directly(server)).write(b"MSG a 1 1\r\n1\r\n")
        with anyio.fail_after(DEADLINE_S):
            while "encountered error" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.005)


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_lost_connection_is_noticed_at_once(end: str) -> None:
    async with connection(error_cb=ignore) as (server, _):
        socket = await is_read_directly(server)
        if end == "reset":
            reset(socket)
        else:
            socket.close()
        await server.connected(2)


async def test_what_follows_a_message_that_takes_time_waits_for_it() -> None:
    order: list[str] = []

    async def slowly(error: Exception) -> None:
        order.append("begun")
        await anyio.sleep(0.05)
        order.append("done")

    async with connection(error_cb=slowly) as (server, client):
        await subscribe(client, "a", lambda message: order.append(message.data.decode()))
        socket = await is_read_directly(server)
        socket.write(b"-ERR 'Permissions Violation for Publish to \"x\"'\r\nMSG a 1 1\r\n1\r\n")
        await anyio.sleep(0.01)
        socket.write(b"MSG a 1 1\r\n2\r\nMSG a 1 1\r\n3\r\n")
        with anyio.fail_after(DEADLINE_S):
            while len(order) < 5:  # noqa: ASYNC110
                await anyio.sleep(0.005)
    assert order == ["begun", "done", "1", "2", "3"]


UVLOOP = "asyncio", {"use_uvloop": True}


def reset(socket: asyncio.StreamWriter) -> None:
    """End a connection with an error rather than with an end of its bytes."""
    socket.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    socket.close()


async def test_a_connection_that_is_lost_while_a_message_takes_time_is_noticed() -> None:
    async def slowly(error: Exception) -> None:
        await anyio.sleep(0.05)

    async with connection(error_cb=slowly) as (server, _):
        socket = await is_read_directly(server)
        socket.write(b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n")
        await anyio.sleep(0.01)
        reset(socket)
        await server.connected(2)


@pytest.mark.parametrize("anyio_backend", [UVLOOP])
async def test_nothing_is_written_to_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bool] = []
    async with connection(error_cb=ignore) as (server, client), anyio.create_task_group() as tasks:
        socket = await is_read_directly(server)
        loop = asyncio.get_running_loop()
        set_exception = DirectReader.set_exception

        def lose(reader: DirectReader, error: Exception) -> None:
            # Before the read loop learns of the loss.
            loop.call_soon(lambda: sent.append(client.send(b"PUB a 0\r\n\r\n")))
            tasks.start_soon(client.publish, "last", b"the end")
            set_exception(reader, error)

        monkeypatch.setattr(DirectReader, "set_exception", lose)
        reset(socket)
        await server.has_received(b"the end")
    assert sent == [False]


async def test_what_arrives_after_a_connection_was_given_up_does_not_reach_the_next_one() -> None:
    taken: list[bytes] = []
    async with connection(error_cb=ignore) as (server, client):
        await subscribe(client, "a", lambda message: taken.append(message.data))
        await is_read_directly(server)
        reader = client._transport._io_reader
        assert reader is not None
        await client._process_op_err(nats.errors.StaleConnectionError())
        reader.feed_data(b"MSG a 1 5000\r\n")
        (await server.connected(2)).write(b"MSG a 1 1\r\n1\r\n")
        with anyio.fail_after(DEADLINE_S):
            while not taken:  # noqa: ASYNC110
                await anyio.sleep(0.005)
    assert taken == [b"1"]


async def test_a_socket_that_takes_no_more_makes_publishes_wait_in_order() -> None:
    async with connection() as (server, client):
        server.reads.clear()
        await server.connected(1)
        line = b"x" * 1000
        count = 0
        while client.send(b"PUB a %d\r\n%s%d\r\n" % (len(line) + len(str(count)), line, count)):
            count += 1
            assert count < 100_000, "no socket takes 100 MB"
        assert client._transport._io_writer is not None
        unsent = client._transport._io_writer.transport.get_write_buffer_size()
        assert unsent <= UNSENT_BYTES_MAX + 2 * len(line), "bytes must not pile up here"
        assert client.has_unsent
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.publish, "last", b"the end")
            await anyio.sleep(0.02)
            server.reads.set()
            await server.has_received(b"the end")
    numbers = [
        int(part[len(line) :]) for part in bytes(server.received).split(b"\r\n") if part[:9] == line[:9]
    ]
    assert numbers == list(range(count))
