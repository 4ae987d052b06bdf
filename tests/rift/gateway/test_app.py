"""What the app logs of requests that fail."""

from typing import Any

import pytest

from events.log import LogError
from rift.gateway.api.routes import Route
from rift.gateway.app import Gateway
from rift.gateway.asgi import tally
from rift.gateway.exchange import Exchanges

pytestmark = pytest.mark.anyio


async def fail(*_: object) -> None:
    raise LogError("no answer")


ROUTE = "GET /{id}"
FAILING = Route(
    method="GET", path="/{id}", handler=lambda to: fail, summary="", name="", answers={}, errors=()
)


async def test_requests_that_fail_without_the_log_share_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients may send any number of them, and any path."""
    now_s = 1000.0
    monkeypatch.setattr(tally.anyio, "current_time", lambda: now_s)
    gateway = Gateway([FAILING], None, Exchanges(lambda: 0), bytes)  # type: ignore[arg-type]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        assert message.get("status", 503) == 503

    scope = {"method": "GET", "path": "/a\nb", "raw_path": b"/a%0Ab", "headers": []}
    for _ in range(100):
        await gateway(scope, receive, send)
    now_s += tally.REPORT_S
    await gateway(scope, receive, send)
    assert [each.getMessage() for each in caplog.records] == [
        f"the log did not answer {count} requests, the last {ROUTE}: no answer" for count in (1, 100)
    ]
