"""The gateway's README lists every field and header of OpenAI's APIs, correctly."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from rift.gateway.asgi.errors import HTTPError
from rift.gateway.dialects import chat_request, completions_request, responses_request
from tests.scripted import MODEL, Served

README = (Path(chat_request.__file__).parents[1] / "README.md").read_text()
ROW = re.compile(r"^\| `([^`]+)` \| (supported|ignored|refused) \|", re.MULTILINE)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
ROUTES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Chat completions": (chat_request.ChatBody, chat_request.parse_chat, CHAT),
    "Completions": (
        completions_request.CompletionBody,
        completions_request.parse_completion,
        {"model": "m", "prompt": "hi"},
    ),
    "Responses": (responses_request.ResponseBody, responses_request.parse, {"model": "m", "input": "hi"}),
}


def table(section: str) -> dict[str, str]:
    body = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = ROW.findall(body)
    assert len(rows) == len({name for name, _ in rows}), "each field once"
    return dict(rows)


@pytest.mark.parametrize("section", ROUTES)
def test_fields_match_the_table(section: str) -> None:
    body, read, given = ROUTES[section]
    rows = table(section)
    assert {name for name, what in rows.items() if what == "refused"} == set(body.unserved)
    supported = {name for name, what in rows.items() if what == "supported"}
    assert supported == set(body.__struct_fields__) - set(body.unserved)
    for name, what in rows.items():
        if what == "ignored":
            assert read(encoded(given)) == read(encoded(given | {name: {"any": "thing"}}))
        if what == "refused":
            with pytest.raises(HTTPError) as caught:
                read(encoded(given | {name: [{"any": "thing"}]}))
            assert (caught.value.code, caught.value.param) == ("unsupported", name)
            neutral = body.unserved[name]
            assert read(encoded(given | {name: neutral})) == read(encoded(given))


def test_the_tables_have_every_field_of_the_sdk() -> None:
    pytest.importorskip("openai", reason="the openai package is not installed")
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as responses

    for section, module in (("Chat completions", chat), ("Completions", completions)):
        fields = set(module.CompletionCreateParamsBase.__annotations__) | {"stream"}
        assert fields <= set(table(section))
    fields = set(responses.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert fields <= set(table("Responses"))


@pytest.mark.slow
def test_headers_match_the_table(served: Served) -> None:
    rows = table("Headers")
    body = {"model": MODEL, "prompt": "hi"}
    plain = {"Authorization": f"Bearer {served.key}", "Content-Type": "application/json"}

    def post(headers: dict[str, str], path: str = "/v1/completions") -> httpx.Response:
        return httpx.post(served.url + path, headers=headers, content=json.dumps(body))

    first = post(plain)
    assert first.status_code == 200
    for name, what in rows.items():
        if what == "ignored":
            again = post(plain | {name: "x"})
            assert (again.status_code, set(again.headers)) == (200, set(first.headers))
    assert post({"Content-Type": "application/json"}).status_code == 401
    assert post(plain | {"Content-Type": "text/plain"}).status_code == 415
    key = plain | {"Idempotency-Key": "fields"}
    assert "idempotent-replayed" not in post(key).headers
    assert post(key).headers["idempotent-replayed"] == "true"
    assert post(plain | {"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    assert {name for name, what in rows.items() if what == "supported"} == {
        "Authorization", "Content-Type", "Idempotency-Key", "X-Request-Id"
    }  # fmt: skip


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
