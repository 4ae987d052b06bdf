"""The OpenAPI document covers every route, and every answer has the documented type."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rift.gateway.api import openai_schemas, openapi, schemas
from rift.gateway.api.routes import ROUTES
from tests.rift.gateway.dialects.test_chat_response import TOOL, streamed
from tests.scripted import MODEL, Served

pytestmark = pytest.mark.slow

# The control process answers these. A scripted worker has none, so the answer must be 503.
ASKED = r"/v1/(usage|invoices)"


def test_the_document_is_served_without_a_key_and_names_every_route(served: Served) -> None:
    with served.client(key="none") as client:
        response = client.get("/openapi.json")
    assert response.status_code == 200
    document = response.json()
    assert document == json.loads(msgspec.json.encode(openapi.document(ROUTES)))
    assert document["openapi"] == "3.1.0"
    with served.client() as client:
        for route in ROUTES:
            path = route.path.replace("{id}", "x")
            assert client.request(route.method, path).status_code != 405, route
            for method in {"GET", "POST", "DELETE", "PUT"} - {
                other.method for other in ROUTES if other.path == route.path
            }:
                assert client.request(method, path).status_code == 405, (method, path)


def answers(served: Served) -> Iterator[tuple[type, dict[str, Any]]]:
    """Yield every kind of answer with its documented type."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "low"}
    tools = {"tools": [TOOL], "tool_choice": "required"}
    usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    with served.client() as client:

        def post(path: str, **body: Any) -> Any:
            return client.post(path, json={"model": MODEL, **body})

        for more in ({}, tools, {"n": 2}, {"logprobs": True, "top_logprobs": 2}):
            yield openai_schemas.ChatCompletion, post("/v1/chat/completions", **chat, **more).json()
            for chunk in streamed(served, **chat, **more, **usage):
                yield openai_schemas.ChatCompletionChunk, chunk
        yield openai_schemas.Completion, post("/v1/completions", prompt="hi", logprobs=2).json()
        for chunk in streamed(served, "/v1/completions", logprobs=2, **usage):
            yield openai_schemas.Completion, chunk
        for given in ({"input": "hi", **tools_flat()}, {"input": "hi", "reasoning": {"effort": "low"}}):
            yield openai_schemas.Response, post("/v1/responses", **given, top_logprobs=2).json()
            for data in events(post("/v1/responses", **given, stream=True, top_logprobs=2).text):
                yield openai_schemas.ResponseEvent, data
        for data in events(post("/v1/responses", input="fail late", stream=True).text):
            yield openai_schemas.ResponseEvent, data
        begun = post("/v1/responses", input="slowly", background=True).json()
        yield openai_schemas.Response, begun
        yield openai_schemas.Response, client.get(f"/v1/responses/{begun['id']}").json()
        yield openai_schemas.Response, client.post(f"/v1/responses/{begun['id']}/cancel").json()
        whole = post("/v1/inference", prompt="hi").json()
        yield schemas.Inference, whole
        yield schemas.Inference, client.get(f"/v1/inference/{whole['id']}").json()
        for path, name, what in (("/v1/inference", "prompt", "/content"), ("/v1/responses", "input", "")):
            sealed = post(path, **{name: "hi"}, store=False).json()
            yield schemas.Deleted, client.delete(f"{path}/{sealed['id']}{what}").json()
        yield schemas.InferenceStatus, post("/v1/inference", prompt="hi", background=True).json()
        *tokens, done = events(post("/v1/inference", prompt="hi", stream=True).text)
        yield schemas.InferenceEnd, done
        for data in tokens:
            yield schemas.InferenceEvent, data
        for data in events(post("/v1/inference", prompt="fail late", stream=True).text):
            yield schemas.InferenceEvent, data
        yield schemas.Error, post("/v1/inference").json()
        yield schemas.Error, client.get("/nowhere").json()
        yield schemas.ModelList, client.get("/v1/models").json()
        yield schemas.Model, client.get(f"/v1/models/{MODEL}").json()
        for path in ("/health", "/livez", "/readyz"):
            yield schemas.Health, client.get(path).json()
        yield schemas.Version, client.get("/version").json()


def test_every_answer_has_exactly_its_documented_fields(served: Served) -> None:
    seen = set()
    for kind, answer in answers(served):
        msgspec.convert(answer, kind)
        seen.add(kind)
    documented = {one.body for each in ROUTES for one in each.answers.values()}
    # These lists need a control process: test_api.py and test_money.py check them.
    asked = {schemas.InferenceList, schemas.InvoiceList, schemas.MonthInvoice, schemas.UsageReport}
    assert {kind for kind in documented if isinstance(kind, type)} - seen == asked


# Headers of HTTP itself, those for proxies, and those that let pages of other origins read an answer.
COMMON = (
    r"content-(type|length)|transfer-encoding|date|connection|cache-control|x-accel-buffering"
    r"|access-control-.*|timing-allow-origin"
)


def test_every_header_of_an_answer_is_documented(served: Served) -> None:
    document = openapi.document(ROUTES)
    hi = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    known = {"Idempotency-Key": "headers"}
    undocumented = set()
    with served.client() as client:
        native = client.post("/v1/inference", json={"model": MODEL, "prompt": "hi"}).json()["id"]
        for method, path, id, more in (
            ("post", "/v1/inference", "", {"json": {}}),
            ("post", "/v1/inference", "", {"content": "x" * (3 << 20)}),
            ("post", "/v1/inference", "", {"json": {}, "headers": {"Authorization": "Bearer x"}}),
            ("post", "/v1/chat/completions", "", {"json": hi | {"stream": True}}),
            ("post", "/v1/chat/completions", "", {"json": hi, "headers": known}),
            ("post", "/v1/chat/completions", "", {"json": hi, "headers": known}),
            ("post", "/v1/chat/completions", "", {"json": hi | {"n": 2}, "headers": known}),
            ("get", "/v1/inference/{id}", native, {}),
            ("get", "/v1/inference/{id}", "x", {}),
            ("delete", "/v1/inference/{id}/content", native, {}),
            ("get", "/v1/inference/{id}/events", native, {}),
            ("get", "/v1/usage", "", {}),
            ("get", "/readyz", "", {}),
        ):
            answer = client.request(method, path.replace("{id}", id), **more)
            responses = document["paths"][path][method]["responses"]
            shown = responses[str(answer.status_code)]
            if "$ref" in shown:
                shown = document["components"]["responses"][shown["$ref"].rpartition("/")[2]]
            for name in answer.headers:
                if name not in shown["headers"] and not re.fullmatch(COMMON, name):
                    undocumented.add((path, answer.status_code, name))
    assert not undocumented


def tools_flat() -> dict[str, Any]:
    return {"tools": [{"type": "function", **TOOL["function"]}], "tool_choice": "required"}  # type: ignore[dict-item]


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]


def test_schemathesis_finds_no_server_error_and_nothing_undocumented(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="the schemathesis package is not installed")
    options = [
        "--header", f"Authorization: Bearer {served.key}", "--exclude-path-regex", ASKED,
        "--exclude-operation-id", "list_inferences", "--seed", "7",
        "--max-examples", "12", "--request-timeout", "20", "--phases", "examples,coverage,fuzzing",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,response_headers_conformance,unsupported_method",
        "--no-color",
    ]  # fmt: skip
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"generated, \d+ passed", done.stdout), done.stdout[-2000:]
