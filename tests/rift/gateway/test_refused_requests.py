"""Each kind of refusal and failure, as clients saw it, is in the log and in SQL with the same counts."""

import json
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import codec, subjects
from events.contracts import REFUSALS_REPORT_S
from events.memory import MemoryBroker
from events.schema import CreditGranted, LimitsSet, Problem, RequestsRefused
from replay.questions import named
from replay.warehouse.warehouse import Warehouse
from rift.gateway.api.health import HealthRoutes
from rift.metrics.families import Collector
from rift.metrics.families import Counts as CountedFamily
from tests import scripted
from tests.rift.gateway.admission.test_credit import World, live, opened
from tests.rift.gateway.admission.test_rate_limits import key_of, revoke, tell, whole
from tests.scripted import End, Pause, Tokens
from tests.simulation.client import Call
from tests.simulation.processes import MODEL, GatewayProcess

NATIVE = "/v1/inference"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
Counts = Counter[tuple[str | None, str]]


class Clients:
    """Clients of one gateway. `refused` counts what they were answered, by account and error code."""

    def __init__(self, world: World, gateway: GatewayProcess) -> None:
        self.world = world
        self.gateway = gateway
        self.refused: Counts = Counter()
        self.keys = {account: key_of(world, account).text for account in ("acme", "poor", "slow")}

    def call(self, method: str, path: str, account: str | None, body: Any = None, **headers: str) -> Call:
        given = {"authorization": f"Bearer {self.keys[account]}"} if account is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given.setdefault("content-type", "application/json")
        return Call(method, path, headers=given, body=body)

    async def refuse(self, code: str, call: Call, account: str | None) -> None:
        """Send a request, and expect an error."""
        self.gateway.serve(call)
        status, got = await whole(call)
        assert (status >= 400, got) == (True, code), call.data
        self.refused[account, code] += 1

    async def get(self, code: str, path: str, account: str | None = "acme", **headers: str) -> None:
        await self.refuse(code, self.call("GET", path, account, **headers), account)

    async def post(
        self, code: str, body: Any, account: str = "acme", path: str = NATIVE, **headers: str
    ) -> None:
        whole_body = {"model": MODEL} | body if isinstance(body, dict) else body
        await self.refuse(code, self.call("POST", path, account, whole_body, **headers), account)

    async def accept(
        self, account: str = "acme", *, tokens: int = 1, idempotency_key: str | None = None, **more: Any
    ) -> str:
        """Send a request that is accepted, and return its id."""
        body = {"model": MODEL, "prompt": "x", "background": True, "parameters": {"max_tokens": tokens}}
        headers = {} if idempotency_key is None else {"idempotency_key": idempotency_key}
        call = self.call("POST", NATIVE, account, body | more, **headers)
        self.gateway.serve(call)
        status, answer = await whole(call)
        assert status == 202, answer
        return str(answer["id"])


async def without_a_key(clients: Clients) -> None:
    await clients.get("not_found", "/nothing", None)
    await clients.refuse("method_not_allowed", clients.call("PUT", NATIVE, None), None)
    ambiguous = clients.call("GET", "/v1/models/a", None)
    ambiguous.scope["raw_path"] = b"/v1/models/%00"
    await clients.refuse("malformed_http", ambiguous, None)
    await clients.get("missing_api_key", "/v1/models", None)
    for _ in range(3):
        await clients.get("invalid_api_key", "/v1/models", None, authorization="Bearer rift_x_y")
    world = clients.world
    for code, key in {
        "revoked_api_key": key_of(world, "acme"),
        "expired_api_key": key_of(world, "acme", expires_at_ns=1),
    }.items():
        if code == "revoked_api_key":
            revoke(world, key, "acme")
        await anyio.sleep(0.1)
        await clients.get(code, "/v1/models", None, authorization=f"Bearer {key.text}")


async def with_a_wrong_key(clients: Clients) -> None:
    for code, granted in {
        "insufficient_scope": {"scopes": ("usage",)},
        "model_not_allowed": {"models": ()},
    }.items():
        clients.keys["odd"] = key_of(clients.world, "odd", **granted).text
        await anyio.sleep(0.1)
        await clients.post(code, {"prompt": "hello"}, "odd")


async def wrong_bodies(clients: Clients) -> None:
    await clients.post("unsupported_media_type", {"prompt": "x"}, content_type="text/plain")
    await clients.post("body_too_large", {"prompt": "x"}, content_length="99999999")
    slow = clients.call("POST", NATIVE, "acme", {})
    slow._body = None
    await clients.refuse("body_timeout", slow, "acme")
    broken = clients.call("POST", NATIVE, "acme", {})
    broken._body = b"{"
    await clients.refuse("invalid_json", broken, "acme")
    await clients.post("invalid_value", {"prompt": 7})
    await clients.post("unsupported", {"messages": HELLO, "bad_words": ["x"]}, path=CHAT)
    await clients.post("invalid_idempotency_key", {"prompt": "x"}, idempotency_key="")
    await clients.post("model_not_found", {"model": "none", "prompt": "x"})
    await clients.post("model_unavailable", {"prompt": "x"})


async def over_a_limit(clients: Clients) -> None:
    tell(clients.world, CreditGranted(id="nothing", account="poor", nanousd=0))
    limits = {
        "budget_exhausted": {"budget_nanousd": 0},
        "requests_per_minute": {"requests_per_minute": 1},
        "tokens_per_minute": {"tokens_per_minute": 1},
        "log_bytes_per_minute": {"log_bytes_per_minute": 1},
        "concurrent_requests": {"concurrent": 1},
        "idempotency_keys": {"idempotency_keys": 1},
    }
    for code, limit in limits.items():
        account = code.replace("_", "-")
        clients.keys[account] = key_of(clients.world, account).text
        tell(clients.world, LimitsSet(id=f"limit.{account}", account=account, **limit))
    await anyio.sleep(0.1)
    await clients.post("max_tokens_too_large", {"prompt": "x", "parameters": {"max_tokens": 9999}})
    await clients.post("context_length_exceeded", {"messages": HELLO, "max_tokens": 9999}, path=CHAT)
    await clients.post("credit_exhausted", {"prompt": "x"}, "poor")
    for code in limits:
        account = code.replace("_", "-")
        if code not in ("budget_exhausted", "tokens_per_minute"):
            await clients.accept(account, tokens=400, idempotency_key="one", store=False)
        for _ in range(2):
            await clients.post(code, {"prompt": "x", "store": False}, account, idempotency_key="two")


async def in_a_full_queue(clients: Clients) -> None:
    flood = {"model": MODEL, "prompt": "x", "background": True, "parameters": {"max_tokens": 400}}
    status = 202
    while status == 202:
        call = clients.call("POST", NATIVE, "slow", flood)
        clients.gateway.serve(call)
        status, got = await whole(call)
    assert got == "queue_share"
    clients.refused["slow", got] += 1
    await anyio.sleep(180)


async def about_stored_requests(clients: Clients) -> None:
    await clients.accept(idempotency_key="one")
    await clients.post("idempotency_key_reused", {"prompt": "other"}, idempotency_key="one")
    running = await clients.accept(tokens=400)
    sealed = await clients.accept(tokens=20, store=False)
    await clients.refuse(
        "request_not_ended", clients.call("DELETE", f"{NATIVE}/{sealed}/content", "acme"), "acme"
    )
    await clients.get("request_not_found", f"{NATIVE}/req_1")
    await clients.get("invalid_event_id", f"{NATIVE}/{running}/events?after=9999")
    erased = clients.call("DELETE", f"{NATIVE}/{running}/content", "acme")
    await clients.refuse("content_not_sealed", erased, "acme")
    await clients.get("control_unavailable", "/v1/usage")
    # Its key is erased 60 s after its end.
    await anyio.sleep(30)
    erased = clients.call("DELETE", f"{NATIVE}/{sealed}/content", "acme")
    clients.gateway.serve(erased)
    assert (await whole(erased))[0] == 200
    await clients.get("content_removed", f"{NATIVE}/{sealed}")


async def without_the_log(clients: Clients) -> None:
    """The reports of these minutes wait, too."""
    broker = clients.world.broker
    broker.is_full = True
    await clients.post("log_full", {"prompt": "x"})
    for _ in range(3):
        await anyio.sleep(REFUSALS_REPORT_S)
        await clients.get("log_unavailable", "/readyz", None)
    broker.is_full = False
    await anyio.sleep(3 * REFUSALS_REPORT_S)
    broker.stream(subjects.BOOK).set_silent(True)
    await anyio.sleep(30)
    await clients.get("book_unavailable", "/v1/models", None)
    broker.stream(subjects.BOOK).set_silent(False)
    await anyio.sleep(30)


def reported(broker: MemoryBroker) -> Counts:
    counts: Counts = Counter()
    opening, *messages = broker.stream("RIFT_0").messages
    for stored in messages:
        for event in codec.decode(stored.data)[1]:
            if isinstance(event, RequestsRefused):
                assert not event.other
                assert opening.stored_at_ns <= event.from_at_ns < event.to_at_ns <= stored.stored_at_ns
                counts.update({(one.account, one.reason): one.count for one in event.counts})
    return counts


def scraped(collectors: Iterable[Collector]) -> Counter[str]:
    """Return the gateway's metric of refusals, by reason."""
    return Counter(
        {
            sample.labels["reason"]: int(sample.value)
            for each in collectors
            if isinstance(each, CountedFamily)
            for metric in each.collect()
            for sample in metric.samples
            if sample.name == "rift_gateway_refusals_total"
        }
    )


def by_reason(counts: Counts) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for (_, reason), count in counts.items():
        reasons[reason] += count
    return reasons


def asked(broker: MemoryBroker) -> Counts:
    """Return the answer to `rift ask refusals`."""
    with closing(Warehouse.open(Path(":memory:"))) as warehouse:
        for stream in (subjects.BOOK, subjects.FLEET, "RIFT_0"):
            warehouse.apply(stream, broker.stream(stream).messages)
        assert list(warehouse.failed_checks()) == []
        rows = warehouse.query(named("refusals").select({"since": "9d"}, broker.now_ns())).rows
        return Counter({(account, reason): requests for account, reason, requests, *_ in rows})


def test_each_kind_of_refusal_is_in_the_log_and_in_sql() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        clients = Clients(world, gateway)
        await anyio.sleep(0.1)
        for refuse in (without_a_key, with_a_wrong_key, wrong_bodies):
            await refuse(clients)
        await world.work()
        for refuse in (over_a_limit, in_a_full_queue, about_stored_requests, without_the_log):
            await refuse(clients)
        await anyio.sleep(2 * REFUSALS_REPORT_S)
        assert reported(world.broker) == clients.refused
        opened(gateway).stopping.set()
        await clients.post("gateway_stopping", {"prompt": "x"})
        gateway.stop.set()
        await gateway.ended.wait()
        assert reported(world.broker) == asked(world.broker) == clients.refused
        assert scraped(opened(gateway).collectors) == by_reason(clients.refused)

    live(test)


# --- failures, and answers that are given before a request is one -----------------------------------------

HEAD = b"host: x\r\nconnection: close\r\n"
BELOW = {
    "http_version": b"GET / HTTP/2.0\r\n" + HEAD,
    "malformed_http": b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n",
    "headers_too_large": b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n" + HEAD,
    "encoding_unsupported": b"POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n" + HEAD,
    "websocket_unsupported": b"GET / HTTP/1.1\r\nupgrade: websocket\r\n" + HEAD,
}
FAILURES = {
    "engine": End("failed", Problem(code="engine", message="it failed")),
    "invalid_messages": End("invalid", Problem(code="invalid_messages", message="no user speaks")),
    "poison": End("poison"),
    "expired": End("expired"),
}


def raw(port: int, request: bytes) -> str:
    """Return the error code of an answer to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request + b"\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


def test_failures_and_unreadable_requests_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(HealthRoutes, "version", crash)
    refused: Counts = Counter()
    with scripted.serving() as served:
        for code, request in BELOW.items():
            assert raw(served.port, request) == code
            refused[None, code] += 1
        with served.client() as client:
            assert client.get("/version").json()["error"]["code"] == "internal_error"
            refused[None, "internal_error"] += 1
            for code, end in FAILURES.items():
                served.script = lambda _, end=end: [end]
                for path, body in (
                    (NATIVE, {"prompt": "x"}),
                    (NATIVE, {"prompt": "x", "stream": True}),
                    (CHAT, {"messages": HELLO}),
                ):
                    answer = client.post(path, json={"model": scripted.MODEL} | body)
                    assert (answer.status_code >= 400, answer.json()["error"]["code"]) == (True, code)
                    refused["acme", code] += 1
                # A stream that has begun has the status 200.
                served.script = lambda _, end=end: [Tokens("Hi"), Pause(0.1), end]
                body = {"model": scripted.MODEL, "prompt": "x", "stream": True}
                assert client.post(NATIVE, json=body).status_code == 200
    assert reported(served.broker) == asked(served.broker) == refused
    assert scraped(served.collectors) == by_reason(refused)
