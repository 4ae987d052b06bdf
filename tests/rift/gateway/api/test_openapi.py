"""The document's words, names and examples. tests/conformance/test_openapi.py compares it with answers."""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from rift.gateway.api import openapi
from rift.gateway.api.error_codes import by_status
from rift.gateway.api.routes import ROUTES, Route
from rift.gateway.dialects.dialect import CHAT, COMPLETIONS, NATIVE, RESPONSES

DOCUMENT: dict[str, Any] = json.loads(msgspec.json.encode(openapi.document(ROUTES)))
TYPES = DOCUMENT["components"]["schemas"]
OPERATIONS = {
    operation["operationId"]: operation
    for methods in DOCUMENT["paths"].values()
    for operation in methods.values()
}
VERBS = "cancel|check|create|delete|get|list|stream"


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    for name in node.get("$ref", "#").split("/")[1:]:
        node = DOCUMENT[name] if name == "components" else node[name]
    return node


def test_every_field_of_every_type_has_a_description() -> None:
    bare = [
        f"{name}.{field}"
        for name, schema in TYPES.items()
        for field, shown in schema.get("properties", {}).items()
        if not shown.get("description", "").endswith(".")
    ]
    assert len(TYPES) > 60
    assert not bare, "describe them with note(…) where they are declared"


def test_everything_else_has_a_description() -> None:
    components = DOCUMENT["components"]
    named = [DOCUMENT["info"], *DOCUMENT["tags"], *DOCUMENT["servers"], *components["headers"].values()]
    named += [*components["securitySchemes"].values(), *components["responses"].values()]
    for operation in OPERATIONS.values():
        assert operation["summary"].endswith(".")
        named += operation.get("parameters", [])
        named += [resolved(response) for response in operation["responses"].values()]
    assert not [shown for shown in named if not shown["description"].endswith(".")]


def test_every_operation_has_a_name_for_generated_clients_and_a_tag() -> None:
    assert len(OPERATIONS) == len(ROUTES)
    assert not [name for name in OPERATIONS if not re.fullmatch(rf"({VERBS})(_[a-z]+)+", name)]
    tags = [tag["name"] for tag in DOCUMENT["tags"]]
    used = {tag for operation in OPERATIONS.values() for tag in operation["tags"]}
    assert set(tags) == used
    assert DOCUMENT["servers"] == [{"url": "/", "description": "This gateway."}]


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r'"\$ref":"(.*?)"', msgspec.json.encode(DOCUMENT).decode()))
    assert len(references) > 100
    for reference in references:
        node: Any = DOCUMENT
        for name in reference.split("/")[1:]:
            node = node[name]


def schemas(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from schemas(inner)


def test_programs_that_generate_clients_understand_every_type() -> None:
    for schema in schemas(TYPES):
        if isinstance(values := schema.get("enum"), list):
            assert len(values) > 1
            assert {type(value) for value in values} == {str}, values
        if schema.get("type") == "array":
            assert "items" in schema


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_a_route_lists_each_code_at_its_status(route: Route) -> None:
    responses = OPERATIONS[route.name]["responses"]
    shown = {}
    for status, response in responses.items():
        if int(status) >= 400:
            shown[int(status)] = re.findall(r"^- `(\w+)`: ", resolved(response)["description"], re.MULTILINE)
    assert shown == {
        status: [code.name for code in codes] for status, codes in by_status(route.errors).items()
    }
    assert {405, 431, 500, 501, 503, 505} <= shown.keys()


def test_errors_have_their_headers() -> None:
    for operation in OPERATIONS.values():
        for status, response in operation["responses"].items():
            headers = set(resolved(response)["headers"])
            assert ("retry-after" in headers) == (status in ("429", "503"))
            assert ("allow" in headers) == (status == "405")
    limited = resolved(OPERATIONS["create_inference"]["responses"]["429"])["headers"]
    assert {"retry-after", "retry-after-ms", "x-should-retry", "x-ratelimit-remaining-tokens"} <= set(limited)
    assert "403" in OPERATIONS["create_inference"]["responses"]


@pytest.mark.parametrize("dialect", [NATIVE, COMPLETIONS, CHAT, RESPONSES], ids=lambda each: each.kind)
def test_every_example_of_a_body_is_a_valid_request(dialect: Any) -> None:
    (route,) = [each for each in ROUTES if each.body is dialect.body]
    assert route.examples
    for example in route.examples.values():
        dialect.parse(msgspec.json.encode(example["value"]))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_every_answer_has_a_valid_example(route: Route) -> None:
    for status, answer in route.answers.items():
        if answer.body is not None:
            shown = OPERATIONS[route.name]["responses"][str(status)]["content"]["application/json"]
            msgspec.convert(shown["example"], answer.body)


def test_every_parameter_has_an_example_of_its_type() -> None:
    kinds = {"string": str, "integer": int}
    for operation in OPERATIONS.values():
        for parameter in operation.get("parameters", []):
            schema, example = parameter["schema"], parameter["example"]
            assert isinstance(example, kinds[schema["type"]]), parameter
            assert re.search(schema.get("pattern", ""), str(example)), parameter


def test_the_examples_of_a_field_are_valid() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the jsonschema package is not installed")
    shown = [field for field in openapi.fields(TYPES) if "examples" in field]
    assert len(shown) > 50
    for field in shown:
        validator = jsonschema.Draft202012Validator({**field, "components": DOCUMENT["components"]})
        for example in field["examples"]:
            validator.validate(example)
