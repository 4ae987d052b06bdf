"""Three independent parsers of server-sent events read the same from every stream."""

import json
from typing import Any

import httpx
import pytest

from tests.conformance import node
from tests.scripted import MODEL, End, Pause, Served, Tokens

pytestmark = pytest.mark.slow

Event = tuple[str, str]
CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
STREAMS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "stream": True},
    "/v1/responses": {"input": "hi", "stream": True},
    "/v1/inference": {"prompt": "hi", "stream": True},
}


@pytest.fixture(autouse=True)
def _script(served: Served) -> None:
    """Pause before the first token, and within a character that JSON must escape."""
    served.script = lambda accepted: [
        Pause(1.2), Tokens('a "quoted"\nline\r\n'), Tokens("data: x\n\n"), Tokens("\u2028 🌊"), End()
    ]  # fmt: skip


@pytest.fixture(params=STREAMS)
def raw(request: Any, served: Served) -> bytes:
    with served.client() as client:
        response = client.post(request.param, json={"model": MODEL, **STREAMS[request.param]})
    assert response.headers["content-type"] == "text/event-stream"
    return response.content


def test_httpx_sse(raw: bytes) -> None:
    httpx_sse = pytest.importorskip("httpx_sse", reason="the httpx-sse package is not installed")
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=raw)
    found = [(sse.event, sse.data) for sse in httpx_sse.EventSource(response).iter_sse()]
    assert found == by_hand(raw)


def test_sseclient(raw: bytes) -> None:
    sseclient = pytest.importorskip("sseclient", reason="the sseclient-py package is not installed")
    pieces = iter([raw[at : at + 7] for at in range(0, len(raw), 7)])
    found = [(event.event, event.data) for event in sseclient.SSEClient(pieces).events()]
    assert found == by_hand(raw)


def test_eventsource_parser(raw: bytes) -> None:
    found = [json.loads(line) for line in node.run("parser.mjs", given=raw).split("\n") if line]
    assert [(each["event"] or "message", each["data"]) for each in found] == by_hand(raw)


def by_hand(raw: bytes) -> list[Event]:
    """Parse Rift's plain frames: one line per field, an empty line after each, comments apart."""
    found = []
    for frame in raw.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        if "" not in fields:
            found.append((fields.get("event", "message"), fields["data"]))
            assert fields["data"] == "[DONE]" or json.loads(fields["data"])
    assert len(found) > 3
    return found
