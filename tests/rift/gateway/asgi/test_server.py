"""The server over real sockets: direct writes, the version of hypercorn, crashes, and the end."""

from importlib.metadata import version
from inspect import iscoroutinefunction, signature
from typing import Any

import anyio
import pytest
from hypercorn.protocol import h11

from rift.gateway.asgi import server
from rift.gateway.asgi.request import WHEN_GONE, WRITE_CHUNK
from rift.gateway.asgi.server import FRAMING
from tests.rift.gateway.asgi.serving import HEAD, Paths, error, serving, until

pytestmark = pytest.mark.anyio


class App:
    """Answer with two chunks, the first directly if possible, and record which path it took."""

    def __init__(self) -> None:
        self.wrote: list[bool | None] = []
        self.clients: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.clients.append(scope["client"][0])
        write = scope.get("extensions", {}).get(WRITE_CHUNK)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if write is None:
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
        self.wrote.append(None if write is None else write(b"first"))
        await send({"type": "http.response.body", "body": b" last", "more_body": False})
        if write is not None:
            while write(b"after the end"):  # noqa: ASYNC110  # until the connection is closed
                await anyio.sleep(0.01)


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
    assert app.clients == ["127.0.0.1"]
    assert b"transfer-encoding: chunked" in found.lower()
    assert found.partition(b"\r\n\r\n")[2].startswith(b"5\r\nfirst\r\n5\r\n last\r\n")


async def test_a_response_without_chunks_goes_through_the_server() -> None:
    app = App()
    async with serving(app) as running:
        found = await answer(running.port, b"GET / HTTP/1.0")
    assert app.wrote == [None]
    assert found.endswith(b"first last")


# --- hypercorn -----------------------------------------------------------------------------------------


class Headed:
    """Answer with given headers, with a body of 2 bytes."""

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.headers = headers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("protocol", ["1.0", "1.1"])
@pytest.mark.parametrize("framing", [[], [(b"content-length", b"2")], [(b"connection", b"close")]])
async def test_a_head_is_the_one_that_h11_would_write(
    method: str, protocol: str, framing: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = [(b"server-timing", b"a;dur=1"), *framing, (b"server-timing", b"b;dur=\xe9"), (b"x-empty", b"")]
    request = f"{method} / HTTP/{protocol}\r\nHost: rift\r\nConnection: close\r\n\r\n".encode()
    answers = []
    for names in ((), FRAMING):
        # If every header frames the body, h11 writes the head alone.
        monkeypatch.setattr(server, "FRAMING", names or [name for name, _ in headers])
        async with serving(Headed(headers)) as running:
            head, _, body = (await running.ask(request)).partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        answers.append((status, sorted(each for each in lines if not each.startswith(b"date: ")), body))
    assert answers[0] == answers[1]
    assert answers[0][1].count(b"server-timing: a;dur=1") == 1


@pytest.mark.parametrize("header", [(b"x-a", b"1\r\nx-b: 2"), (b"x-a", b"\0"), (b"x-\na", b"1")])
async def test_no_control_character_gets_into_a_head(
    header: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Headed([header])) as running:
        answer = await running.ask(HEAD)
    assert error(answer) == (500, "internal_error")
    assert "a control character in a header" in caplog.text


async def test_a_function_is_called_once_the_client_has_left() -> None:
    gone: list[str] = []
    left = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["more_body"] is False
        scope["extensions"][WHEN_GONE](lambda: (gone.append("first"), left.set()))
        await left.wait()
        scope["extensions"][WHEN_GONE](lambda: gone.append("at once"))

    async with serving(app) as running:
        stream = await running.connect(HEAD)
        await anyio.sleep(0.05)
        assert not gone
        await stream.aclose()
        await until(lambda: gone == ["first", "at once"])


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


async def test_a_crash_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Paths()) as running:
        crashed = await running.ask(b"GET /crash HTTP/1.1\r\nHost: rift\r\n\r\n")
        assert error(crashed) == (500, "internal_error")
    assert "a request failed" in caplog.text
    assert "/crash" not in caplog.text, "a path may hold a key"


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
