"""Objects and events of `/v1/responses`, and of a single choice, byte for byte."""

import json
from typing import Any
from unittest.mock import Mock

import pytest

from events.schema import Logprob
from rift.gateway.dialects import responses_response
from tests.scripted import MODEL, End, Served, Tokens

pytestmark = pytest.mark.slow

PATH = "/v1/responses"
SCHEMA = '{"type": "object",\n\t"properties": {\r\n"a\\nb": {"const": [1.50, 12345678901234567890]}\r}}'


def frames(text: str) -> list[dict[str, Any]]:
    """Return the JSON of each event; an event has two lines."""
    found = []
    for frame in text.strip().split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_with_line_breaks_is_sent_on_one_line(served: Served, *, strict: bool) -> None:
    tool = f'{{"type": "function", "name": "f", "strict": {json.dumps(strict)}, "parameters": {SCHEMA}}}'
    form = f'{{"format": {{"type": "json_schema", "name": "n", "schema": {SCHEMA}}}}}'
    body = f'{{"model": "{MODEL}", "input": "hi", "stream": true, "tools": [{tool}], "text": {form}}}'
    with served.client() as client:
        told = client.post(PATH, content=body, headers={"Content-Type": "application/json"}).text
    assert "\r" not in told
    assert "1.50" in told, "numbers keep their spelling"
    first, *_, last = [event["response"] for event in frames(told) if "response" in event]
    for shown in (first, last):
        assert shown["tools"][0]["parameters"] == json.loads(SCHEMA)
        assert shown["text"]["format"]["schema"] == json.loads(SCHEMA)


def piece(text: str, *tokens: str, reasoning: str = "") -> Tokens:
    logprobs = tuple(Logprob(token=token, logprob=-0.5) for token in tokens)
    return Tokens(text, reasoning=reasoning, logprobs=logprobs)


def tokens(logprobs: list[dict[str, Any]]) -> list[str]:
    return [each["token"] for each in logprobs]


def test_logprobs_of_tokens_without_text_come_with_the_next_text(served: Served) -> None:
    served.script = lambda accepted: [
        piece("", "t1"), piece("", "t2", reasoning="think"), piece("", "a1"), piece("🌊", "a2"),
        piece("!", "b"), piece("", "c"), End(),
    ]  # fmt: skip
    body = {"model": MODEL, "input": "hi", "top_logprobs": 0, "include": ["message.output_text.logprobs"]}
    with served.client() as client:
        whole = client.post(PATH, json=body).json()
        events = frames(client.post(PATH, json=body | {"stream": True}).text)
        again = client.get(f"{PATH}/{whole['id']}").json()
    assert again == whole
    part = whole["output"][1]["content"][0]
    assert tokens(part["logprobs"]) == ["a1", "a2", "b", "c"], "the first belong to the reasoning"
    assert events[-1]["response"]["output"][1]["content"] == [part]
    told = [event for event in events if event["type"].startswith("response.output_text")]
    assert [tokens(event["logprobs"]) for event in told] == [["a1", "a2"], ["b"], ["a1", "a2", "b", "c"]]


def test_each_token_of_a_stream_is_encoded_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last events show every token again. As objects, a long answer would stop all others for seconds."""
    encoded = Mock(wraps=responses_response.token_logprob)
    monkeypatch.setattr(responses_response, "token_logprob", encoded)
    served.script = lambda accepted: [piece("a", "a"), piece("b", "b"), piece("", "c"), End()]
    body = {"model": MODEL, "input": "hi", "top_logprobs": 0, "include": ["message.output_text.logprobs"]}
    with served.client() as client:
        text = client.post(PATH, json=body | {"stream": True}).text
    assert text.count('"token":"a"') == 5
    assert [each.args[0].token for each in encoded.mock_calls] == ["a", "b", "c"]


def test_resuming_past_the_end_names_the_last_event(served: Served) -> None:
    with served.client() as client:
        answer = client.post(PATH, json={"model": MODEL, "input": "hi"}).json()
        at = f"{PATH}/{answer['id']}?stream=true&starting_after="
        events = frames(client.get(f"{at}-1").text)
        last = events[-1]["sequence_number"]
        assert frames(client.get(f"{at}{last - 1}").text) == events[-1:]
        assert client.get(f"{at}{last}").text == "", "no event follows it"
        for true in ("True", "1"):
            again = client.get(f"{PATH}/{answer['id']}", params={"stream": true})
            assert frames(again.text) == events, "Python and shells write it so"
        for beyond in (last + 1, 999):
            (told,) = frames(client.get(f"{at}{beyond}").text)
            assert (told["type"], told["code"], told["param"]) == (
                "error",
                "invalid_event_id",
                "starting_after",
            )
            assert str(last) in told["message"]


def test_a_single_choice_of_a_group_has_no_charge(served: Served) -> None:
    """A group is charged its prompt once, so one choice does not show its share."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "n": 2}
    with served.client() as client:
        client.post("/v1/chat/completions", json=body)
        client.post("/v1/chat/completions", json=body | {"n": 1})
        shown = [client.get(f"/v1/inference/{each.request}").json() for each in served.accepted]
        done = client.get(f"/v1/inference/{served.accepted[0].request}/events").text
    assert [each["charge"] and each["charge"]["nanousd"] for each in shown] == [None, None, 7 * 100 + 5 * 350]
    assert '"charge":null' in done
