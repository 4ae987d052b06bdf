"""When a stream's status line is sent: with the first output, or at a deadline."""

import json

import anyio
import pytest

from events.schema import Problem
from rift.gateway.streams import delivery
from tests.rift.gateway.admission.test_credit import World, live
from tests.scripted import MODEL, End, Pause, Served, Tokens
from tests.simulation import processes

BODIES: dict[str, dict[str, object]] = {
    "/v1/inference": {"prompt": "hi"},
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
}
REFUSED = End("invalid", Problem(code="invalid_schema", message="the schema has no type"))


def body(path: str) -> dict[str, object]:
    return BODIES[path] | {"model": MODEL, "stream": True}


@pytest.mark.parametrize("path", BODIES)
def test_a_refusal_by_an_engine_that_has_begun_is_an_http_status(served: Served, path: str) -> None:
    served.script = lambda accepted: [Pause(0.1), REFUSED]
    with served.client() as client:
        refused = client.post(path, json=body(path))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_schema")


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_without_output_begins_at_a_deadline(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(delivery, "STATUS_LINE_S", 0.1)
    served.script = lambda accepted: [Pause(0.4), REFUSED]
    with served.client() as client:
        refused = client.post(path, json=body(path))
    assert (refused.status_code, "the schema has no type" in refused.text) == (200, True)


@pytest.mark.parametrize("first", [Tokens("Hello"), End("stop")])
def test_a_stream_begins_with_its_first_output_or_end(
    served: Served, monkeypatch: pytest.MonkeyPatch, first: Tokens | End
) -> None:
    monkeypatch.setattr(delivery, "STATUS_LINE_S", 30)
    served.script = lambda accepted: [Pause(0.05), first, Pause(30), End()]
    path = "/v1/inference"
    with served.client() as client, client.stream("POST", path, json=body(path)) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("event: "))
        assert next(events) == "event: status"
        assert next(events) == ("event: token" if isinstance(first, Tokens) else "event: done")


def test_a_stream_of_a_cold_model_begins_with_its_status() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(processes.MODEL,))
        call = world.ask(gateway, prompt="hello", stream=True)
        await anyio.sleep(delivery.STATUS_LINE_S + 0.1)
        assert (call.status, b'"status":"starting"' in call.data) == (200, True)

    live(test)


def test_an_openai_stream_of_a_cold_model_has_only_keep_alives() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(processes.MODEL,))
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True}
        call = world.ask(gateway, "/v1/chat/completions", **asked)
        comment = b": keep-alive\n\n"
        await anyio.sleep(delivery.STATUS_LINE_S - 0.1)
        assert (call.data, call.status) == (b"", 0)
        await anyio.sleep(0.2)
        assert (call.data, call.status) == (comment, 200), "the status line, so that no client times out"
        await anyio.sleep(delivery.KEEP_ALIVE_S - 0.2)
        assert call.data == comment
        await anyio.sleep(0.2)
        assert call.data == 2 * comment
        await world.work()
        while await call.more():
            pass
        *_, last, done = [part for part in call.data.split(b"\n\n") if part][2:]
        assert json.loads(last.removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
        assert done == b"data: [DONE]"
        assert call.data.count(b": keep-alive") == 2

    live(test)
