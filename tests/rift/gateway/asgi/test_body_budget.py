"""Bodies under way are bounded, of one account and in all, and what they held is free again."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from events.contracts import BODY_BYTES_MAX
from rift.gateway.asgi import request as requests
from rift.gateway.asgi.body_budget import (
    ACCOUNT_BODIES_BYTES_MAX,
    BODIES_BYTES_MAX,
    BODY_BYTES_MIN,
    BodyBudget,
)
from rift.gateway.asgi.errors import ClientGone, HTTPError
from rift.gateway.asgi.request import Request
from rift.gateway.dialects.dialect import NATIVE
from rift.gateway.exchange import Exchange
from tests.scripted import MODEL, Served

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024


def request_of(*chunks: Any, declared: int | None = None) -> Request:
    """Return a request whose body is these chunks; None stands for a client that sends nothing more."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        chunk = left.pop(0)
        if chunk is None:
            await requests.anyio.sleep_forever()
        if chunk == "gone":
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(_: Any) -> None:
        raise AssertionError

    headers = [] if declared is None else [(b"content-length", b"%d" % declared)]
    scope = {"method": "POST", "path": "/", "headers": headers, "query_string": b""}
    return Request(scope, receive, send, own_id="id", exchange=Exchange(0))


async def outcome(budget: BodyBudget, request: Request, *, account: str = "a", limit: int = MIB) -> Any:
    try:
        with budget.hold(account, limit) as hold:
            return bytes(await request.body(hold))
    except HTTPError as refused:
        return refused.status, refused.code


async def test_a_body_is_read_whole_and_its_bytes_are_free_again() -> None:
    budget = BodyBudget()
    for declared in (None, 6):
        assert await outcome(budget, request_of(b"abc", b"", b"def", declared=declared)) == b"abcdef"
        with budget.hold("a", MIB) as hold:
            await request_of(b"x" * 9000, declared=declared).body(hold)
            assert budget.size == 9000
    with pytest.raises(ClientGone), budget.hold("a", MIB) as hold:
        await request_of(b"x" * 9000, "gone").body(hold)
    assert (budget.size, dict(budget._accounts)) == (0, {})


async def test_a_body_over_the_limit_of_its_route_is_refused_as_early_as_possible() -> None:
    budget = BodyBudget()
    # Nothing is read of the first: `receive` would fail.
    assert await outcome(budget, request_of(declared=MIB + 1)) == (413, "body_too_large")
    assert await outcome(budget, request_of(b"x" * MIB, b"x")) == (413, "body_too_large")
    assert await outcome(budget, request_of(b"x" * MIB)) == b"x" * MIB


async def test_one_account_cannot_take_the_budget_of_the_others() -> None:
    budget = BodyBudget()
    with ExitStack() as held:
        for _ in range(ACCOUNT_BODIES_BYTES_MAX // BODY_BYTES_MAX):
            held.enter_context(budget.hold("a", BODY_BYTES_MAX)).grow(BODY_BYTES_MAX)
        assert await outcome(budget, request_of(declared=1)) == (429, "concurrent_bodies")
        assert await outcome(budget, request_of(b"x")) == (429, "concurrent_bodies")
        assert await outcome(budget, request_of(b"x"), account="b") == b"x"
        for account in "bcd":
            for _ in range(ACCOUNT_BODIES_BYTES_MAX // BODY_BYTES_MAX):
                held.enter_context(budget.hold(account, BODY_BYTES_MAX)).grow(BODY_BYTES_MAX)
        assert budget.size == BODIES_BYTES_MAX
        assert await outcome(budget, request_of(b"x"), account="e") == (503, "bodies_full")
    assert budget.size == 0
    # The number of small bodies is bounded too.
    with budget.hold("a", MIB) as hold:
        hold.grow(1)
        assert budget.size == BODY_BYTES_MIN


async def test_a_body_that_stalls_is_given_up_early_if_it_holds_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "SLOW_S", 0.05)
    budget = BodyBudget()
    began_s = time.monotonic()
    assert await outcome(budget, request_of(b"x", None, declared=MIB)) == (408, "body_timeout")
    # 32 KiB have half a second at the lowest rate.
    held = request_of(b"x" * 32 * 1024, None, declared=MIB)
    assert await outcome(budget, held) == (408, "body_timeout")
    assert 0.5 < time.monotonic() - began_s < 5
    # A small one has as long as any.
    monkeypatch.setattr(requests, "BODY_S", 0.3)
    assert await outcome(budget, request_of(b"x", None)) == (408, "body_timeout")
    assert budget.size == 0


# --- over HTTP --------------------------------------------------------------------------------------------

CHAT = b'{"model":"%b","messages":[{"role":"user","content":"hi"}],"ignored":"' % MODEL.encode()
LARGE = BODY_BYTES_MAX - len(CHAT) - 2


@contextmanager
def held_open(served: Served, key: str) -> Iterator[socket.socket]:
    """Send a body of the largest size, except for its last byte."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {BODY_BYTES_MAX}\r\n\r\n"
    )
    with closing(socket.create_connection(("127.0.0.1", served.port))) as client:
        client.sendall(head.encode() + CHAT + b"x" * LARGE + b'"')
        yield client


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_bodies_that_are_held_open_stop_their_account_only(served: Served) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    path = "/v1/chat/completions"
    with served.client() as client, served.client(served.strangers_key) as stranger:
        with ExitStack() as held:
            bodies = [
                held.enter_context(held_open(served, served.key))
                for _ in range(ACCOUNT_BODIES_BYTES_MAX // BODY_BYTES_MAX)
            ]
            deadline_s = time.monotonic() + 10
            while client.post(path, json=body).status_code == 200:
                assert time.monotonic() < deadline_s
            refused = client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrent_bodies")
            assert refused.headers["retry-after"] == "1"
            assert stranger.post(path, json=body).status_code == 200
            bodies[0].sendall(b"}")
            assert bodies[0].recv(1000).startswith(b"HTTP/1.1 200 ")
            assert client.post(path, json=body).status_code == 200
        deadline_s = time.monotonic() + 10
        large = CHAT + b"x" * LARGE + b'"}'
        while (
            answer := client.post(path, content=large, headers={"content-type": "application/json"})
        ).is_error:
            assert answer.json()["error"]["code"] == "concurrent_bodies"
            assert time.monotonic() < deadline_s
        # The native route accepts short prompts only, so its bodies are smaller.
        native_body = b'{"model":"%b","prompt":"hi","parameters":{}%b}'
        padded = native_body % (MODEL.encode(), b" " * NATIVE.body_bytes_max)
        refused = client.post("/v1/inference", content=padded, headers={"content-type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        assert f"/v1/responses accept {BODY_BYTES_MAX} bytes" in refused.json()["error"]["message"]


async def test_a_body_without_a_valid_key_is_not_kept(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(*_: Any) -> bytearray:
        raise AssertionError("read for a client without a key")

    monkeypatch.setattr(Request, "body", body)
    with held_open(served, "rift_wrong") as client:
        client.sendall(b"}")
        assert client.recv(1000).startswith(b"HTTP/1.1 401 ")
