"""What observers learn of each HTTP request, however it ends."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from rift.gateway.api.routes import Route
from rift.gateway.app import Gateway
from rift.gateway.asgi.errors import ClientGone, HTTPError
from rift.gateway.asgi.request import Request
from rift.gateway.exchange import Exchange, Exchanges
from tests.rift.gateway.asgi.serving import serving, until

pytestmark = pytest.mark.anyio


def ended(handler: Callable[..., Any], seen: list[Exchange], *, fails: bool = False) -> Gateway:
    def fail(exchange: Exchange) -> None:
        raise KeyError("observer")

    route = Route(
        name="",
        method="GET",
        path="/v1/x/{id}",
        handler=lambda to: handler,
        summary="",
        answers={},
        errors=(),
    )
    exchanges = Exchanges(iter(range(100, 200)).__next__, [fail, seen.append] if fails else [seen.append])
    return Gateway([route], None, exchanges, bytes)  # type: ignore[arg-type]


async def ask(gateway: Gateway, path: str = "/v1/x/7", method: str = "GET") -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        pass

    headers = [(b"x-request-id", b"mine")]
    await gateway({"method": method, "path": path, "raw_path": b"", "headers": headers}, receive, send)


async def answer(request: Request, id: str) -> None:
    request.exchange.account = "acme"
    await request.answer(200, {})


async def refuse(request: Request, id: str) -> None:
    raise HTTPError(429, "too many", code="queue_full")


async def read(request: Request, id: str) -> None:
    await request.drain()
    await request.answer(200, {})


async def leave(request: Request, id: str) -> None:
    raise ClientGone


async def crash(request: Request, id: str) -> None:
    raise KeyError("bug")


@pytest.mark.parametrize(
    ("handler", "path", "expected"),
    [
        (answer, "/v1/x/7", ("GET /v1/x/{id}", 200, "", "acme", "mine")),
        (refuse, "/v1/x/7", ("GET /v1/x/{id}", 429, "queue_full", None, "mine")),
        (leave, "/v1/x/7", ("GET /v1/x/{id}", 0, "", None, "")),
        (crash, "/v1/x/7", ("GET /v1/x/{id}", 500, "internal_error", None, "")),
        (answer, "/v1/y", ("", 404, "not_found", None, "mine")),
        (answer, "/docs", ("GET /docs", 200, "", None, "mine")),
    ],
)
async def test_each_end_is_observed_once(
    handler: Callable[..., Any], path: str, expected: tuple[Any, ...]
) -> None:
    seen: list[Exchange] = []
    gateway = ended(handler, seen)
    if handler is crash:
        with pytest.raises(KeyError, match="bug"):
            await ask(gateway, path)
    else:
        await ask(gateway, path)
    (one,) = seen
    assert (one.route, one.status, one.code, one.account, one.client_request_id) == expected
    assert one.started_ns == 100 <= one.ended_ns


async def test_a_request_that_began_before_the_first_record_has_a_time() -> None:
    times_ns = [0, 5_000_000_000]
    seen: list[Exchange] = []
    exchanges = Exchanges(lambda: times_ns.pop(0), [seen.append])
    exchange = exchanges.begin()
    await anyio.sleep(0.001)
    exchanges.end(exchange)
    assert 4_000_000_000 < exchange.started_ns < exchange.ended_ns


async def test_a_cancelled_request_is_observed() -> None:
    async def wait(request: Request, id: str) -> None:
        await anyio.sleep_forever()

    seen: list[Exchange] = []
    with anyio.move_on_after(0.01):
        await ask(ended(wait, seen))
    assert [each.status for each in seen] == [0]


async def test_an_observer_that_fails_harms_nothing_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[Exchange] = []
    gateway = ended(answer, seen, fails=True)
    for _ in range(3):
        await ask(gateway)
    assert len(seen) == 3
    assert len(caplog.records) == 1


async def test_answers_that_the_app_did_not_give_are_reported() -> None:
    seen: list[tuple[int, str]] = []

    async def never(*_: object) -> None:
        raise AssertionError("the app is not asked")

    async with serving(never) as server:
        server.connections.refused = lambda status, code: seen.append((status, code))
        await server.ask(b"GET / HTTP/2.0\r\n\r\n")
        await server.ask(b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 20_000 + b"\r\n\r\n")
    assert seen == [(505, "http_version"), (431, "headers_too_large")]


async def test_a_request_with_a_malformed_body_is_observed_once_as_it_was_answered() -> None:
    seen: list[Exchange] = []
    gateway = ended(read, seen)
    head = b"GET %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving(gateway) as server:
        server.connections.refused = gateway._exchanges.refused
        for path in (b"/v1/x/7", b"/none"):
            assert (await server.ask(head % path + b"1\r\nx\r\nQ\r\n")).startswith(b"HTTP/1.1 400")
        # Nobody reads the answer of this one.
        await (await server.connect(head % b"/none" + b"1\r\nx\r\n")).aclose()
        await until(lambda: len(seen) >= 3)
    assert [(one.route, one.status, one.code) for one in seen] == [
        ("GET /v1/x/{id}", 400, "malformed_http"),
        ("", 400, "malformed_http"),
        ("", 0, ""),
    ]
