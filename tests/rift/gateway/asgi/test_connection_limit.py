"""The number of connections, and which of them gives way at the limit."""

import contextlib
import logging
import socket

import anyio
import pytest

from rift.gateway.asgi import connections as module
from tests.rift.gateway.asgi.serving import (
    BODY,
    HEAD,
    WAIT,
    Paths,
    error,
    is_answered,
    rest,
    serving,
    until,
)

pytestmark = pytest.mark.anyio


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
