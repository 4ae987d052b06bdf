"""The line of each request, and how many there are in a flood of refusals."""

from typing import Any

import anyio
import pytest

from rift.gateway import request_log
from rift.gateway.exchange import Exchange
from rift.gateway.request_log import LINES_MAX, PAIRS_MAX, RequestLog

pytestmark = pytest.mark.anyio


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def at_level_info(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(request_log, "PERIOD_S", 0.02)


async def test_a_request_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange(
        1_000_000_000, route="POST /v1/inference", status=200, account="acme", model="m", request_id="req_1",
        client_request_id="mine", first_token_ns=1_012_340_000, ended_ns=1_050_000_000, prompt_tokens=7,
        output_tokens=3, client="10.0.0.7",
    )  # fmt: skip
    log = RequestLog()
    log.observe(exchange)
    assert fields(caplog) == [
        {
            "route": "POST /v1/inference", "status": 200, "request": "req_1", "client_request": "mine",
            "account": "acme", "model": "m", "prompt_tokens": 7, "output_tokens": 3, "first_token_ms": 12.3,
            "total_ms": 50.0,
        }
    ]  # fmt: skip
    for _ in range(9):
        log.observe(exchange)
    assert len(caplog.records) == 10, "accepted requests are not sampled"
    exchange.started_ns = 2_000_000_000
    log.observe(exchange)
    assert "first_token_ms" not in fields(caplog)[-1], "the answer of an earlier request is repeated"
    log.observe(Exchange(0, route="POST /v1/inference", account="acme"))
    assert caplog.records[-1].getMessage() == "client left before the answer"
    log.observe(Exchange(0, status=401, code="invalid_api_key", client="10.0.0.7"))
    assert fields(caplog)[-1]["client"] == "10.0.0.7", "the only name of a client without a key"


async def test_probes_have_a_line_only_if_they_fail(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog()
    log.observe(Exchange(0, route="GET /readyz", status=200))
    log.observe(Exchange(0, route="GET /readyz", status=503, code="not_ready"))
    assert fields(caplog) == [{"route": "GET /readyz", "status": 503, "code": "not_ready", "total_ms": 0.0}]


async def test_a_flood_of_refusals_has_few_lines_and_their_count(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog()
    for _ in range(LINES_MAX + 7):
        log.observe(Exchange(0, status=429, code="queue_full", account="acme"))
    log.observe(Exchange(0, status=401, code="invalid_api_key"))
    assert len(caplog.records) == LINES_MAX + 1, "another reason has lines of its own"
    await anyio.sleep(0.1)
    assert fields(caplog)[LINES_MAX + 1 :] == [{"omitted": 7, "code": "queue_full", "account": "acme"}]
    log.observe(Exchange(0, status=429, code="queue_full", account="acme"))
    assert fields(caplog)[-1]["status"] == 429, "a period ends"


async def test_a_flood_of_many_accounts_is_bounded_too(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog()
    for number in range(3 * PAIRS_MAX):
        log.observe(Exchange(0, status=402, code="no_credit", account=f"account-{number}"))
    assert len(caplog.records) == PAIRS_MAX + LINES_MAX
    assert len(log._counts) == PAIRS_MAX + 1
    await anyio.sleep(0.1)
    assert fields(caplog)[-1]["omitted"] == 2 * PAIRS_MAX - LINES_MAX
