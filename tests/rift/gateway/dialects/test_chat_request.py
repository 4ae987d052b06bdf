"""Parsing the bodies of OpenAI's APIs, and the errors that name a field."""

import json
import time
from typing import Any

import pytest

from events.schema import Message, ResponseFormat, Tool, ToolCall
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.dialects import chat_request, completions_request, native, responses_request
from rift.gateway.dialects.openai_fields import TOKENIZER_ARGUMENTS
from rift.gateway.dialects.sampling import ParsedRequest

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
FLAT = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
ONE_BAD = [{"type": "function", "function": {"name": "w", "parameters": 1}}]
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": ""}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def chat(**more: Any) -> ParsedRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | more
    return chat_request.parse_chat(json.dumps(body).encode())


def completion(**more: Any) -> ParsedRequest:
    return completions_request.parse_completion(json.dumps({"model": "m", "prompt": "hi"} | more).encode())


def response(**more: Any) -> ParsedRequest:
    return responses_request.parse(json.dumps({"model": "m", "input": "hi"} | more).encode())


def native_body(**more: Any) -> ParsedRequest:
    return native.parse(json.dumps({"model": "m", "prompt": "hi"} | more).encode())


def test_parameters_reach_the_request() -> None:
    said = chat(
        temperature=0.5, top_p=0.9, max_tokens=5, stop=["a", "b"], seed=7, presence_penalty=1, n=3,
        frequency_penalty=-1, logit_bias={"12": -100}, logprobs=True, top_logprobs=4, reasoning_effort="low",
        chat_template_kwargs={"thinking": False}, metadata={"a": "b"}, stream=True, unknown={"x": 1},
        stream_options={"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True},
        user="u", service_tier="auto", store=True, parallel_tool_calls=False,
    )  # fmt: skip
    asked = said.parameters
    assert (asked.temperature, asked.top_p, asked.max_tokens, asked.seed) == (0.5, 0.9, 5, 7)
    assert (asked.stop, asked.logit_bias, asked.logprobs) == (("a", "b"), {"12": -100.0}, 4)
    assert (asked.presence_penalty, asked.frequency_penalty, asked.reasoning_effort) == (1, -1, "low")
    assert (asked.template, asked.parallel_tool_calls) == ('{"thinking":false}', False)
    assert (said.choices, said.metadata, said.stream) == (3, {"a": "b"}, True)
    assert (said.include_usage, said.continuous_usage) == (True, True)


def test_max_completion_tokens_takes_precedence() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).parameters.max_tokens == 7
    assert chat(logprobs=True).parameters.logprobs == 0
    assert chat(logprobs=False).parameters.logprobs is None
    assert completion(logprobs=0).parameters.logprobs == 0
    assert completion(prompt=["one"], best_of=2, n=2).choices == 2


def test_a_completion_has_one_or_several_prompts() -> None:
    assert completion(prompt="one") == completion(prompt=["one"])
    said = completion(prompt=["one", "two", "one"], n=2)
    assert (said.input, said.more, said.choices) == ("one", ("two", "one"), 2)
    assert len(completion(prompt=["a"] * 8).more) == 7
    error = refused(completion, {"prompt": ["a"] * 3, "n": 3})
    assert error.message == (
        "prompt: 3 prompts with `n` 3 are 9 choices; the limit is 8: send fewer prompts in one request"
    )


def test_a_conversation_with_tools_becomes_messages() -> None:
    said = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    call = ToolCall(id="call_1", name="weather", arguments="{}")
    assert said.input == (
        Message(role="developer", content="be brief"),
        Message(role="user", content="a\nb"),
        Message(role="assistant", reasoning="hm", tool_calls=(call,)),
        Message(role="tool", content="rain", tool_call_id="call_1"),
    )
    assert said.parameters.tools == (Tool(name="weather", parameters='{"type": "object"}'),)
    assert (said.parameters.tool_choice, said.parameters.tool_name) == ("function", "weather")


@pytest.mark.parametrize("kind", ["text", "refusal"])
def test_text_parts_are_lines_of_a_chats_turn(kind: str) -> None:
    parts = [{"type": kind, kind: text} for text in ("one", "", "two")]
    assert chat(messages=[{"role": "assistant", "content": parts}]).input == (
        Message(role="assistant", content="one\ntwo"),
    )


def test_text_parts_are_lines_of_a_responses_items() -> None:
    parts = [{"type": "input_text", "text": text} for text in ("one", "", "two")]
    said = response(
        input=[
            {"role": "user", "content": parts},
            {"type": "reasoning", "summary": parts},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": ""},
            {"type": "function_call_output", "call_id": "1", "output": parts},
        ]
    )
    call = ToolCall(id="1", name="weather", arguments="")
    assert said.input == (
        Message(role="user", content="one\ntwo"),
        Message(role="assistant", reasoning="one\ntwo", tool_calls=(call,)),
        Message(role="tool", content="one\ntwo", tool_call_id="1"),
    )


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {"content": []}, {}])
@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"reasoning": "hm"}, {"reasoning": "hm"}),
        ({"reasoning_content": "hm", "tool_calls": []}, {"reasoning": "hm"}),
        ({"tool_calls": [CALL]}, {"tool_calls": (ToolCall(id="call_1", name="weather", arguments="{}"),)}),
        ({"refusal": "no"}, {"content": "no"}),
        ({"reasoning": None, "tool_calls": None}, {}),
    ],
)
def test_an_assistants_turn_needs_no_text(
    turn: dict[str, Any], said: dict[str, Any], content: dict[str, Any]
) -> None:
    messages = [{"role": "assistant"} | content | turn, {"role": "user", "content": "go on"}]
    assert chat(messages=messages).input == (
        Message(role="assistant", **said),
        Message(role="user", content="go on"),
    )


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"type": "reasoning", "summary": [], "content": None}, {}),
        ({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}, {"reasoning": "hm"}),
        ({"role": "assistant", "content": None}, {}),
        ({"role": "assistant", "content": []}, {}),
    ],
)
def test_an_assistants_item_needs_no_text(item: dict[str, Any], said: dict[str, Any]) -> None:
    assert response(input=[item, {"role": "user", "content": "go on"}]).input == (
        Message(role="assistant", **said),
        Message(role="user", content="go on"),
    )


@pytest.mark.parametrize("name", ["get weather", "weather.now", "", "wetter_für_" + "x" * 64])
def test_a_call_may_have_any_name_that_a_model_wrote(name: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": '{"ci'}}
    item = {"type": "function_call", "call_id": "1", "name": name, "arguments": '{"ci'}
    (turn,) = chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]).input
    assert (turn,) == response(input=[item]).input
    assert isinstance(turn, Message)
    assert turn.tool_calls == (ToolCall(id="1", name=name, arguments='{"ci'),)


def test_a_part_may_have_the_fields_of_other_parts_without_value() -> None:
    parts = [
        {"type": "text", "text": "one", "refusal": None},
        {"type": "refusal", "text": None, "refusal": "two"},
        {"type": "text", "text": None},
    ]
    assert chat(messages=[{"role": "assistant", "content": parts}]).input == (
        Message(role="assistant", content="one\ntwo"),
    )


def test_a_body_may_begin_with_the_mark_of_a_file() -> None:
    body = b'{"model": "m", "prompt": "hi"}'
    assert native.parse(b"\xef\xbb\xbf" + body) == native.parse(body)


def test_an_output_without_a_call_names_the_field() -> None:
    error = refused(response, {"input": [{"type": "function_call_output", "output": "x"}]})
    assert (error.param, error.message) == (
        "input[0].call_id",
        "input[0].call_id: the output of a call must name the call",
    )


def test_a_whole_number_may_have_a_fraction_of_zero_or_an_exponent() -> None:
    whole = chat(max_tokens=5, n=2, seed=-7, top_k=0, temperature=1, tools=[WEATHER])
    assert chat(max_tokens=5.0, n=2.0, seed=-7.0, top_k=0.0, temperature=1.0, tools=[WEATHER]) == whole
    assert response(max_output_tokens=5.0) == response(max_output_tokens=5)
    assert completion(logprobs=3.0, best_of=1.0) == completion(logprobs=3, best_of=1)
    body = b'{"model": "m", "prompt": "1.0", "parameters": {"max_tokens": %b}}'
    for written in (b"5.0", b"5e0", b"50E-1", b"0.5e+01"):
        assert native.parse(body % written) == native.parse(body % b"5"), written
    # As R writes it.
    assert native.parse(body % b"1e+05") == native.parse(body % b"100000")
    error = refused(native_body, {"parameters": {"max_tokens": 5.5}})
    assert error.message == "parameters.max_tokens: Expected `int | null`, got `float`"


def test_the_time_to_read_a_fraction_does_not_grow_with_the_depth() -> None:
    depth = 800
    inner = b'{"parameters": ' * depth + b'"' + b"x" * (4 << 20) + b'"' + b"}" * depth
    began_s = time.monotonic()
    with pytest.raises(HTTPError, match=r"^n: Expected"):
        completions_request.parse_completion(
            b'{"model": "m", "prompt": "hi", "parameters": %b, "n": 5.5}' % inner
        )
    assert time.monotonic() - began_s < 1, "read once for each level, it takes several seconds"


def test_token_ids_are_refused_in_words() -> None:
    for ids in ([1, 2], [[1, 2], [3]]):
        error = refused(completion, {"prompt": ids})
        assert error.message == "prompt[0]: token ids are not supported; send text"


def test_a_tool_choice_without_tools_is_dropped() -> None:
    assert chat(tool_choice="auto").parameters.tool_choice is None
    assert chat(tool_choice="none", tools=[]).parameters.tools == ()


def test_a_response_format_keeps_its_schema_verbatim() -> None:
    schema = {"type": "object", "properties": {"n": {"maximum": 10**30}}}
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    wanted = ResponseFormat(type="json_schema", name="n", schema=json.dumps(schema), strict=True)
    assert chat(response_format=given).parameters.response_format == wanted
    flat = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert response(text={"format": flat}).parameters.response_format == wanted
    assert chat(response_format={"type": "text"}).parameters.response_format is None
    assert chat(response_format={"type": "json_object"}).parameters.response_format is not None


def test_a_responses_items_become_messages() -> None:
    said = response(
        instructions="be brief",
        input=[
            {"role": "user", "content": "weather?"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "wait"}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "rain"},
            {
                "type": "function_call_output",
                "call_id": "2",
                "output": [{"type": "input_text", "text": "sun"}],
            },
        ],
        tools=[FLAT],
        max_output_tokens=9,
        reasoning={"effort": "high", "summary": "auto"},
        include=["message.output_text.logprobs"],
    )
    calls = tuple(ToolCall(id=number, name="weather", arguments="{}") for number in "12")
    assert said.input == (
        Message(role="system", content="be brief"),
        Message(role="user", content="weather?"),
        Message(role="assistant", content="wait", reasoning="hm", tool_calls=calls),
        Message(role="tool", content="rain", tool_call_id="1"),
        Message(role="tool", content="sun", tool_call_id="2"),
    )
    assert (said.kind, said.parameters.max_tokens, said.parameters.reasoning_effort) == (
        "response",
        9,
        "high",
    )
    assert said.parameters.logprobs == 0
    assert said.parameters.tools == (Tool(name="weather", parameters='{"type": "object"}'),)


def test_many_calls_of_one_turn_are_read_in_a_moment() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "w", "arguments": "{}"}
    began_s = time.monotonic()
    (turn,) = response(input=[call] * 80_000).input
    assert isinstance(turn, Message)
    assert len(turn.tool_calls) == 80_000
    assert time.monotonic() - began_s < 4, "with a copy of all calls for each, it takes 10 s"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": ONE_BAD}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"structured_outputs": {"regex": "x"}}, "structured_outputs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
)  # fmt: skip
def test_an_invalid_chat_names_its_field(body: dict[str, Any], param: str) -> None:
    refusal = refused(chat, body)
    assert (refusal.param or "").startswith(param), refusal.param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": ["a", None]}, "prompt[1]"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": [1, 2]}, "prompt[0]"),
        ({"prompt": [[1, 2], [3]]}, "prompt[0]"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_an_invalid_completion_names_its_field(body: dict[str, Any], param: str) -> None:
    assert (refused(completion, body).param or "").startswith(param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "w"}]}, "input[0]"),
        ({"input": [OUTPUT]}, "input[0].call_id"),
        ({"instructions": "x", "input": [{"role": "user", "content": "x"}, OUTPUT]}, "input[1].call_id"),
        ({"input": [OUTPUT | {"call_id": None}]}, "input[0].call_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"truncation": "auto"}, "truncation"),
    ],
)  # fmt: skip
def test_an_invalid_response_names_its_field(body: dict[str, Any], param: str) -> None:
    assert (refused(response, body).param or "").startswith(param)


@pytest.mark.parametrize("read", [chat, response])
@pytest.mark.parametrize("name", sorted(TOKENIZER_ARGUMENTS))
def test_template_variables_do_not_reach_the_tokenizer(read: Any, name: str) -> None:
    error = refused(read, {"chat_template_kwargs": {"thinking": True, name: None}})
    assert (error.code, error.param) == ("unsupported", f"chat_template_kwargs.{name}")


def test_an_error_quotes_only_the_ends_of_a_long_value() -> None:
    name = "\x7f" * (1 << 20)
    error = refused(chat, {"messages": [{"role": "user", "content": [{"type": name}]}]})
    assert error.message.startswith("messages[0].content[0].type: only text is supported, got '\\x7f")
    assert error.message.endswith("\\x7f'")
    unknown = refused(native_body, {name: 1})
    assert len(json.dumps(error.body())) + len(json.dumps(unknown.body())) < 100_000


def refused(read: Any, body: dict[str, Any]) -> HTTPError:
    with pytest.raises(HTTPError) as caught:
        read(**body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("field", ["audio", "functions", "modalities", "structured_outputs", "echo"])
def test_a_neutral_value_of_an_unsupported_field_is_accepted(field: str) -> None:
    assert chat(**{field: None}).model == "m"


def test_invalid_utf8_is_refused_anywhere_in_the_body() -> None:
    head = b'{"model":"m","messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":'
    for data in (b'{"name":"w","parameters":{"\xff":1}}}]}', b'{"name":"w","parameters":' + b"[" * 10**5):
        with pytest.raises(HTTPError) as caught:
            chat_request.parse_chat(head + data)
        assert caught.value.status == 400
