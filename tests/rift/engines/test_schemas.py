"""Limits on the size of schemas and patterns."""

import json
from contextlib import suppress
from typing import Any

import pytest

from events.schema import Parameters, ResponseFormat, Tool
from rift.engines import InvalidRequest, schemas
from rift.engines.patterns import pattern_states
from rift.engines.schemas import PATTERN_STATES_MAX, SCHEMA_CHARACTERS_MAX, check_schemas


def format_of(schema: Any) -> Parameters:
    return Parameters(response_format=ResponseFormat(type="json_schema", schema=json.dumps(schema)))


def test_ordinary_schemas_are_accepted() -> None:
    email = r"^[a-zA-Z0-9._%+-]{1,64}@[a-zA-Z0-9.-]{1,255}\.[a-zA-Z]{2,10}$"
    check_schemas(
        format_of({"properties": {f"address_{number}": {"pattern": email} for number in range(10)}})
    )
    counted = {"minProperties": 1, "properties": {f"p{number}": {} for number in range(125)}}
    check_schemas(format_of({"properties": {"a": counted}}))
    many = {f"p{number}": {} for number in range(1000)}
    check_schemas(format_of({"minProperties": 0, "properties": many}))
    check_schemas(format_of({"minProperties": 1, "properties": many, "required": list(many)}))
    same = {f"p{number}": {"minLength": 1, "maxLength": 255} for number in range(500)}
    lengths = {f"p{number}": {"maxLength": 500 + number} for number in range(4)}
    check_schemas(format_of({"properties": same | lengths | {"maxLength": {"maxLength": 50}}}))
    price = {"minimum": 0, "exclusiveMaximum": 99_999.99}
    check_schemas(format_of({"properties": {f"p{number}": price for number in range(500)}}))
    tool = Tool(
        name="f", parameters=json.dumps({"properties": {f"p{n}": {"type": "string"} for n in range(20)}})
    )
    check_schemas(Parameters(tools=(tool,) * 50))


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "((a{1,100}){1,100}){1,100}"},
        {
            "properties": {
                f"p{number}": {"pattern": f"a{{{number}}}"}
                for number in range(500, 501 + PATTERN_STATES_MAX // 500)
            }
        },
        {"anyOf": [{"patternProperties": {"(a{90}){90}": {}}}]},
        {"enum": ["x" * SCHEMA_CHARACTERS_MAX]},
        {"minProperties": 1, "properties": {f"p{number}": {} for number in range(127)}},
        {"properties": {f"p{number}": {} for number in range(1_100)}},
        {"properties": {f"p{number}": {"maxLength": 500 + number} for number in range(9)}},
        {"anyOf": [{"format": "uri-template"}] * 126},
        {"anyOf": [{"format": "ipv6"}] * 334},
        {"properties": {f"p{number}": {"format": "email"} for number in range(950)}},
        {"items": {"properties": {f"p{number}": {"pattern": ".{60}"} for number in range(300)}}},
        {"anyOf": [{"minimum": -1e300, "exclusiveMaximum": 1e300}] * 170},
        {"propertyNames": {"pattern": "([^a]?){60}"}},
        {"anyOf": [{"minLength": number} for number in range(100)]},
        {"anyOf": [{"maxProperties": 9, "properties": {f"p{number}": {} for number in range(90)}}] * 2},
    ],
)
def test_schemas_that_would_compile_for_minutes_are_rejected(schema: Any) -> None:
    with pytest.raises(InvalidRequest) as rejected:
        check_schemas(format_of(schema))
    assert (rejected.value.code, rejected.value.param) == ("schema_too_large", "response_format")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (
            {"properties": {"zip": {"pattern": "^.{9}$"}, "user": {"items": {"pattern": "([^a]?){60}"}}}},
            "patterns, the largest at 'items'; use smaller counts",
        ),
        ({"patternProperties": {"([^a]?){60}": {}}}, "patterns, the largest at 'response_format';"),
        ({"anyOf": [{"maxLength": number} for number in range(300)]}, "different lengths"),
        ({"properties": {f"p{number}": {} for number in range(1_100)}}, "optional properties, "),
        (
            {"properties": {"a" * 100: {"format": "ipv6"}} | {"anyOf": [{"format": "ipv6"}] * 334}},
            "formats, ",
        ),
    ],
)
def test_the_reason_names_the_place_and_what_to_do(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as rejected:
        check_schemas(format_of(schema))
    assert str(rejected.value).startswith("the schemas expand to more than 4000 states, most of them for ")
    assert reason in str(rejected.value)
    assert "a" * 90 not in str(rejected.value)


def test_the_limits_hold_for_all_schemas_together() -> None:
    half = json.dumps({"enum": ["x" * (SCHEMA_CHARACTERS_MAX // 2)]})
    check_schemas(Parameters(tools=(Tool(name="f", parameters=half),)))
    with pytest.raises(InvalidRequest) as rejected:
        check_schemas(Parameters(tools=(Tool(name="f", parameters=half), Tool(name="g", parameters=half))))
    assert rejected.value.param == "tools"


@pytest.mark.parametrize("text", ["{", "[" * 10_000, "nonsense"])
def test_a_schema_must_be_json(text: str) -> None:
    parameters = Parameters(response_format=ResponseFormat(type="json_schema", schema=text))
    with pytest.raises(InvalidRequest, match="response_format: a schema is not valid JSON"):
        check_schemas(parameters)


def test_an_empty_schema_is_ignored() -> None:
    check_schemas(Parameters(response_format=ResponseFormat(type="json_schema", schema="")))


@pytest.mark.parametrize("pattern", ["([a-z]{1,9}@){2}", "[^a]{0,100}[^a]{0,100}[^a]{0,100}"])
def test_a_pattern_is_estimated_once_for_all_checks_of_a_request(
    monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    estimated: list[str] = []

    def estimate(pattern: str, most: int) -> int:
        estimated.append(pattern)
        return pattern_states(pattern, most)

    monkeypatch.setattr(schemas, "pattern_states", estimate)
    schemas._pattern_states.cache_clear()
    for _ in range(3):
        with suppress(InvalidRequest):
            check_schemas(format_of({"pattern": pattern}))
    assert estimated == [pattern]
