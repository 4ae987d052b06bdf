"""Every field of OpenAI's and vLLM's request types does what FIELDS.md says, and every header what the README
says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rift.gateway.asgi.errors import HTTPError
from rift.gateway.dialects import native, support
from rift.gateway.dialects.sampling import ParsedRequest
from tests.conformance import fields
from tests.conformance.fields import SECTIONS
from tests.scripted import MODEL, Served

README = (Path(support.__file__).parents[1] / "README.md").read_text()
ROW = re.compile(r"^\| `([^`]+)` \| (supported|ignored) \|", re.MULTILINE)
DEFAULT = re.compile(r"; default `(.+)`$")
REMEDY = "declare it in rift/gateway/dialects, then run python -m tests.conformance.fields"

NATIVE = "Native"
NATIVE_PARAMETERS = "Native parameters"
BODIES: dict[str, Any] = {section: source.body for section, source in SECTIONS.items()} | {
    NATIVE: native.NativeBody,
    NATIVE_PARAMETERS: native.NativeParameters,
}
# Booleans that are true unless the request says something else.
TRUE = ("store", "parallel_tool_calls")
# OpenAI allows more: 128, and 20.
OURS = {"n": 8, "best_of": 8}


def read(section: str, **more: Any) -> ParsedRequest:
    if source := SECTIONS.get(section):
        return source.parse(json.dumps(source.required | more).encode())
    given = {"parameters": more} if section == NATIVE_PARAMETERS else more
    return native.parse(json.dumps({"model": "m", "prompt": "hi"} | given).encode())


def refusal(section: str, **more: Any) -> HTTPError:
    with pytest.raises(HTTPError) as caught:
        read(section, **more)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("section", SECTIONS)
def test_each_field_is_refused_or_ignored_as_it_is_declared(section: str) -> None:
    same = read(section)
    for name, mark in support.marks(SECTIONS[section].body).items():
        if "refusal" in mark:
            for value in ({"any": "thing"}, ["thing"], "thing", 7, 0.5):
                refused = refusal(section, **{name: value})
                assert (refused.code, refused.param) == ("unsupported", name)
            for value in mark["accepted"]:
                assert read(section, **{name: value}) == same, (name, value)
        if "ignored" in mark:
            for value in ({"any": "thing"}, ["thing"], "thing", 7, True, None):
                assert read(section, **{name: value}) == same, (name, value)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_document_says_what_is_declared(section: str) -> None:
    declared = fields.rift_rows(SECTIONS[section])
    written = fields.document_rows(section)
    assert {name for name, row in declared.items() if row["support"] != "ignored"} <= set(written), REMEDY
    for name, row in written.items():
        assert row | declared[name] == row, (name, REMEDY)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_openai_is_declared(section: str) -> None:
    pytest.importorskip("openai", reason="the openai package is not installed")
    compare(section, "OpenAI", fields.openai_fields(SECTIONS[section]))


@pytest.mark.engine
@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_vllm_is_declared(section: str) -> None:
    compare(section, "vLLM", fields.vllm_fields(SECTIONS[section]))


def compare(section: str, column: str, installed: dict[str, str]) -> None:
    """Compare a column of the document with the installed package."""
    written = {name: row[column] for name, row in fields.document_rows(section).items() if row[column]}
    new = sorted(set(installed) - set(written))
    assert not new, f"{column} has new fields: {new}; {REMEDY}"
    assert installed == written, REMEDY


def supported() -> Iterator[Any]:
    for section, body in BODIES.items():
        kinds = fields.schemas(body)
        schema = kinds[body.__name__]
        for name in schema["properties"]:
            if not support.marks(body)[name] and name not in schema["required"]:
                yield pytest.param(section, name, id=f"{section}-{name}")


@pytest.mark.parametrize(("section", "name"), list(supported()))
def test_a_value_that_asks_for_nothing_changes_nothing(section: str, name: str) -> None:
    same = read(section)
    values: list[Any] = [None, *nothing(section, name)]
    for value in values:
        assert read(section, **{name: value}) == same, value


@pytest.mark.parametrize(("section", "name"), list(supported()))
def test_the_ends_of_the_published_range_are_accepted(section: str, name: str) -> None:
    for value in ends(section, name):
        beside = {"best_of": {"n": value or 1}, "top_logprobs": {"logprobs": True}}.get(name, {})
        assert read(section, **beside, **{name: value}), value


def nothing(section: str, name: str) -> Iterator[Any]:
    """Yield the values of a field that ask for nothing, apart from null."""
    kinds = fields.schemas(BODIES[section])
    for member in members(section, name):
        match member:
            case {"type": "boolean"}:
                yield name in TRUE
            case {"type": "array"}:
                yield []
            case {"type": "string"} if "pattern" not in member:
                yield ""
            case {"$ref": ref} if not kinds[ref.rpartition("/")[2]]["required"]:
                yield {}
            case {"type": "object"}:
                yield {}
    if name in ("top_logprobs", "best_of"):
        yield 0
    if name in ("reasoning_effort", "verbosity"):
        yield ""
    if section == "Responses":
        yield from {"reasoning": [{"effort": ""}], "text": [{"verbosity": ""}]}.get(name, ())


def ends(section: str, name: str) -> Iterator[Any]:
    """Yield the smallest and the largest value of a number, here and at OpenAI, zero, and both booleans."""
    least, most = getattr(SECTIONS.get(section), "published", {}).get(name, (None, None))
    for member in members(section, name):
        if member.get("type") == "boolean" and (section, name) != (NATIVE, "background"):
            yield from (False, True)
        if member.get("type") in fields.NUMBERS:
            values = [member.get("minimum"), member.get("maximum"), least, OURS.get(name, most)]
            yield from (value for value in values if value is not None)
            if member.get("minimum", 1) <= 0:
                yield 0


def members(section: str, name: str) -> list[dict[str, Any]]:
    body = BODIES[section]
    schema = fields.schemas(body)[body.__name__]["properties"][name]
    return list(schema.get("anyOf", [schema]))


def test_more_values_that_ask_for_nothing_change_nothing() -> None:
    """The type of the field does not tell that these ask for nothing."""
    for section in SECTIONS:
        assert read(section, stop=["", ""]) == read(section)
        assert read(section, structured_outputs={"json": None, "json_object": False}) == read(section)
        assert read(section, prompt_cache_options={"prewarm": False}) == read(section)
    assert read("Chat completions", tools=[], tool_choice="auto") == read("Chat completions")
    assert read("Chat completions", verbosity="medium") == read("Chat completions")
    assert read("Responses", text={"format": {"type": "text"}, "verbosity": "medium"}) == read("Responses")
    plain = {"effort": None, "summary": "auto", "context": "auto", "mode": "standard"}
    assert read("Responses", reasoning=plain) == read("Responses")


@pytest.mark.parametrize("section", SECTIONS)
def test_vllms_defaults_change_nothing(section: str) -> None:
    """Some clients send every field. Rift's default of `max_tokens` is its own."""
    same = read(section)
    for name, row in fields.document_rows(section).items():
        if (default := DEFAULT.search(row["vLLM"])) and name != "max_tokens":
            assert read(section, **{name: json.loads(default[1])}) == same, name


def test_fields_of_vllm_reach_the_request() -> None:
    for section, body in (
        ("Chat completions", {"verbosity": "low"}),
        ("Responses", {"text": {"verbosity": "low"}}),
    ):
        asked = read(
            section, chat_template_kwargs={"thinking": True}, logit_bias={"5": -1}, **body
        ).parameters
        assert asked.template == '{"verbosity":"low","thinking":true}'
        assert asked.logit_bias == {"5": -1.0}


@pytest.mark.parametrize(
    ("section", "more", "param"),
    [
        ("Responses", {"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ("Responses", {"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ("Completions", {"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ("Chat completions", {"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        (
            "Chat completions",
            {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
    ],
)
def test_a_nested_field_is_refused_with_its_path(section: str, more: dict[str, Any], param: str) -> None:
    refused = refusal(section, **more)
    assert (refused.code, refused.param) == ("unsupported", param)


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b"]}}}


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        {"text": {"format": {"type": "json_object", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA), "structured_outputs": {"json": SCHEMA}},
    ],
    ids=str,
)
def test_every_way_to_send_a_schema_has_the_same_effect(more: dict[str, Any]) -> None:
    for section, source in SECTIONS.items():
        if set(more) <= set(source.body.__struct_fields__):
            given = read(section, **more).parameters.response_format
            assert given is not None
            assert (given.type, given.name, given.schema) == ("json_schema", "answer", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": SCHEMA}}},
            "response_format.json_schema",
        ),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "guided_json"),
        ({"structured_outputs": {"json": SCHEMA, "json_object": True}}, "structured_outputs.json_object"),
    ],
    ids=str,
)
def test_formats_that_contradict_each_other_are_refused(more: dict[str, Any], param: str) -> None:
    for section in ("Chat completions", "Completions"):
        assert refusal(section, **more).param == param


@pytest.mark.parametrize("section", BODIES)
def test_a_seed_is_clamped_to_64_bits(section: str) -> None:
    if section != NATIVE:
        assert read(section, seed=9223372036854776000).parameters.seed == 2**63 - 1
        assert read(section, seed=-9223372036854776000).parameters.seed == -(2**63)
        assert read(section, seed=-1).parameters.seed is None, "vLLM draws a seed for it"
        for seed in (2**64, 10**4000):
            at = "parameters." if section == NATIVE_PARAMETERS else ""
            assert refusal(section, seed=seed).param == f"{at}seed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 0},
            "length",
        ),
        ("completions", {"prompt": "hi", "max_tokens": 0, "top_p": 0, "stop": "", "best_of": 0}, "length"),
        ("responses", {"input": "hi", "max_output_tokens": 0, "ignore_eos": None}, "incomplete"),
        ("inference", {"prompt": "hi", "parameters": {"max_tokens": 0}, "store": None}, "length"),
    ],
)
def test_an_answer_may_have_no_token(path: str, body: dict[str, Any], end: str, served: Served) -> None:
    with served.client() as client:
        for stream in (None, True):
            response = client.post(f"/v1/{path}", json={"model": MODEL, "stream": stream, **body})
            assert response.status_code == 200, response.text
            assert f'"{end}"' in response.text
            assert "Hello" not in response.text


@pytest.mark.slow
def test_a_refused_field_is_a_400_that_names_it(served: Served) -> None:
    with served.client() as client:
        response = client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "guided_regex": "a"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported", "guided_regex")
    assert error["message"] == (
        "guided_regex: this field is not supported; leave it out; use a JSON schema with a `pattern`"
    )


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
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    context = {"traceparent": parent, "tracestate": "a=1"}
    trace, span = post(plain | context).headers["traceparent"].rsplit("-", 2)[:2]
    assert (trace, span == parent[36:52]) == (parent[:35], False)
    assert served.accepted[-1].tracestate == "a=1"
    assert {name for name, what in rows.items() if what == "supported"} == {
        "Authorization", "Content-Type", "Idempotency-Key", "X-Request-Id", "traceparent", "tracestate"
    }  # fmt: skip


def table(section: str) -> dict[str, str]:
    body = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = ROW.findall(body)
    assert len(rows) == len({name for name, _ in rows}), "each header once"
    return dict(rows)
