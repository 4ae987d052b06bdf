"""Objects and events of `/v1/responses`, and what of a request is shown alone, byte by byte."""

import json
from typing import Any

import pytest

from tests.scripted import MODEL, Served

pytestmark = pytest.mark.slow

PATH = "/v1/responses"
SCHEMA = '{"type": "object",\n\t"properties": {\r\n"a\\nb": {"const": [1.50, 12345678901234567890]}\r}}'


def frames(text: str) -> list[dict[str, Any]]:
    """The JSON of each event; each is two lines."""
    found = []
    for frame in text.strip().split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_over_several_lines_is_told_in_one(served: Served, *, strict: bool) -> None:
    tool = f'{{"type": "function", "name": "f", "strict": {json.dumps(strict)}, "parameters": {SCHEMA}}}'
    form = f'{{"format": {{"type": "json_schema", "name": "n", "schema": {SCHEMA}}}}}'
    body = f'{{"model": "{MODEL}", "input": "hi", "stream": true, "tools": [{tool}], "text": {form}}}'
    with served.client() as client:
        told = client.post(PATH, content=body, headers={"Content-Type": "application/json"}).text
    assert "\r" not in told
    assert "1.50" in told, "its numbers are as they were written"
    first, *_, last = [event["response"] for event in frames(told) if "response" in event]
    for shown in (first, last):
        assert shown["tools"][0]["parameters"] == json.loads(SCHEMA)
        assert shown["text"]["format"]["schema"] == json.loads(SCHEMA)
