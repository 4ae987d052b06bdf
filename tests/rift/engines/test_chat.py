"""Chat with the default model: vLLM renders, constrains and parses. One engine for all tests."""

import json
import logging
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import msgspec
import pytest

from events.schema import Message, Parameters, ResponseFormat, Tool, ToolCall
from rift import catalogue
from rift.engines import InvalidRequest, prepare
from rift.engines.chat import chat_request
from rift.engines.engine_words import INTERNAL, QUOTING
from rift.engines.vllm import VllmEngine
from rift.worker.attempt import NotContinuable
from tests.rift.engines.conftest import start, stop
from tests.rift.worker.answers import accepted, answer_of, past_of, run, tokens_of

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

MODEL = catalogue.shipped()["smollm2:135m"]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "cet"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
TOOLS = (
    Tool(name="get_weather", description="The weather", parameters=json.dumps(CITY)),
    Tool(name="get_time", parameters=json.dumps(ZONE)),
)
QUESTION = (Message(role="user", content="What is the capital of France?"),)
CITY_FORMAT = ResponseFormat(type="json_schema", name="city", schema=json.dumps(CITY))


@pytest.fixture(scope="module")
async def engine(anyio_backend: object) -> AsyncIterator[VllmEngine]:
    del anyio_backend
    folder = prepare.prepare(MODEL.source)
    engine = await start(folder, MODEL, MODEL.profiles["cpu"])
    yield engine
    await stop(engine)


async def ask(engine: VllmEngine, messages: Any = QUESTION, **parameters: Any) -> list[Any]:
    return await run(engine, accepted(messages, **{"temperature": 0.0, "max_tokens": 100, **parameters}))


def is_city(value: Any) -> bool:
    return set(value) == {"city", "days"} and value["days"] in (1, 2, 3) and len(value["city"]) <= 20


# --- prompts -------------------------------------------------------------------------------------


CONVERSATIONS = [
    QUESTION,
    (Message(role="system", content="Be brief."), *QUESTION),
    (*QUESTION, Message(role="assistant", content="Paris."), Message(role="user", content=" And of 水? \n")),
    (Message(role="system", content=""), Message(role="user", content="")),
    (Message(role="developer", content="Be brief."), *QUESTION),
    (Message(role="system", content="x-anthropic-billing-header: x\nBe brief."), *QUESTION),
    (
        *QUESTION,
        Message(
            role="assistant",
            reasoning="Hm.",
            tool_calls=(ToolCall(id="call_1", name="get_time", arguments='{"zone": "utc"}'),),
        ),
        Message(role="tool", content="12:00", tool_call_id="call_1", name="get_time"),
        Message(role="user", content="So?", name="bob"),
    ),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
async def test_a_chat_has_the_ids_that_vllms_server_gives_it(
    engine: VllmEngine, messages: tuple[Message, ...]
) -> None:
    _, (theirs,) = await engine._chat._renderer.render_chat(chat_request(messages, Parameters()))
    ours = await engine.render(messages, Parameters(), raw=False, tokens_max=100_000)
    assert list(ours.prompt_ids) == list(theirs["prompt_token_ids"])


async def test_vllm_logs_nothing_that_quotes_a_request(engine: VllmEngine) -> None:
    del engine
    assert not any(logging.getLogger(f"{name}.x").isEnabledFor(logging.CRITICAL) for name in QUOTING)
    assert logging.getLogger("vllm.v1.engine").isEnabledFor(logging.ERROR)


async def test_template_arguments_reach_the_template(engine: VllmEngine) -> None:
    asked = Parameters(template='{"mood": "kind"}', reasoning_effort="low")
    kwargs = engine._chat._kwargs(chat_request(QUESTION, asked))
    assert (kwargs["mood"], kwargs["reasoning_effort"], kwargs["enable_thinking"]) == ("kind", "low", True)


async def test_a_prompt_is_a_chat_of_one_turn_unless_it_is_raw(engine: VllmEngine) -> None:
    (turn,) = QUESTION
    chat = await engine.render(QUESTION, Parameters(), raw=False, tokens_max=100_000)
    assert (
        await engine.render(turn.content, Parameters(), raw=False, tokens_max=100_000)
    ).prompt_ids == chat.prompt_ids
    with_tools = await engine.render(turn.content, Parameters(tools=TOOLS), raw=False, tokens_max=100_000)
    assert with_tools.prompt_ids == chat.prompt_ids, "the model's template ignores tools"
    raw = await engine.render(turn.content, Parameters(), raw=True, tokens_max=100_000)
    assert len(raw.prompt_ids) < len(chat.prompt_ids)
    with pytest.raises(InvalidRequest, match="messages"):
        await engine.render(turn.content, Parameters(tools=TOOLS), raw=True, tokens_max=100_000)


# --- grammars ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_an_answer_satisfies_its_schema(engine: VllmEngine, seed: int) -> None:
    events = await ask(engine, response_format=CITY_FORMAT, temperature=0.7, seed=seed, max_tokens=200)
    assert events[-1].reason == "stop"
    assert is_city(json.loads(answer_of(events).text))


async def test_chats_and_completions_can_be_constrained_to_a_json_object(engine: VllmEngine) -> None:
    json_object = ResponseFormat(type="json_object")
    for messages, raw in ((QUESTION, False), ("The capital as JSON: ", True)):
        events = await ask(engine, messages, response_format=json_object, max_tokens=300, raw=raw)
        if events[-1].reason == "stop":
            assert isinstance(json.loads(answer_of(events).text), dict)
        assert answer_of(events).text.lstrip().startswith("{")


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_required_call_satisfies_its_tools_schema(engine: VllmEngine, seed: int) -> None:
    events = await ask(
        engine, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1.2, seed=seed
    )
    answer = answer_of(events)
    (call,) = answer.tool_calls
    arguments = json.loads(call.arguments)
    assert is_city(arguments) if call.name == "get_weather" else arguments["zone"] in ("utc", "cet")
    assert (events[-1].reason, answer.text, answer.reasoning) == ("tool_calls", "", "")


@pytest.mark.parametrize("name", ["get_weather", "get_time"])
async def test_a_named_call_satisfies_its_tools_schema(engine: VllmEngine, name: str) -> None:
    events = await ask(engine, tools=TOOLS, tool_choice="function", tool_name=name, temperature=1.2, seed=5)
    (call,) = answer_of(events).tool_calls
    assert call.name == name
    assert set(json.loads(call.arguments)) == ({"zone"} if name == "get_time" else {"city", "days"})
    # As in vLLM's server: the model did not choose the call.
    assert events[-1].reason == "stop"


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_optional_tools_do_not_change_the_answer(engine: VllmEngine, choice: str) -> None:
    events = await ask(engine, tools=TOOLS, tool_choice=choice)
    assert events[-1].reason == "stop"
    assert "Paris" in answer_of(events).text
    assert answer_of(events).text == answer_of(await ask(engine)).text
    assert "<|" not in answer_of(events).text


async def test_an_answer_under_a_grammar_is_not_continued(engine: VllmEngine) -> None:
    asked = {"response_format": CITY_FORMAT, "temperature": 0.0, "max_tokens": 50}
    begun = tokens_of(await ask(engine, **asked))[:3]
    with pytest.raises(NotContinuable, match="grammar"):
        await run(engine, accepted(QUESTION, **asked), past_of(begun))


async def test_the_logprobs_spell_the_answer(engine: VllmEngine) -> None:
    prompt = (Message(role="user", content="Repeat: 水は流れる 🌊"),)
    events = await ask(engine, prompt, logprobs=5, max_tokens=30)
    logprobs = [logprob for event in tokens_of(events) for logprob in event.logprobs]
    assert len(logprobs) == events[-1].output_tokens
    text = "".join(logprob.token for logprob in logprobs).removesuffix("<|im_end|>")
    assert text.startswith(answer_of(events).text.rstrip("\ufffd"))
    for logprob in logprobs:
        assert len(logprob.top) == 5
        assert sum(math.exp(entry.logprob) for entry in logprob.top) <= 1.0001
        assert logprob.logprob <= logprob.top[0].logprob


# --- invalid and odd requests ---------------------------------------------------------------------


def schema_of(schema: Any) -> ResponseFormat:
    return ResponseFormat(
        type="json_schema", schema=schema if isinstance(schema, str) else json.dumps(schema)
    )


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {"type": "string"}


def pattern(text: str) -> ResponseFormat:
    properties = {"a": {"type": "string", "pattern": text}}
    return schema_of({"type": "object", "properties": properties, "required": ["a"]})


REQUIRED = {"tool_choice": "required"}
BAD: Sequence[tuple[dict[str, Any], str]] = [
    ({"response_format": schema_of("[]")}, "response_format"),
    ({"response_format": schema_of("{")}, "response_format"),
    ({"response_format": schema_of({"type": "nonsense"})}, "response_format"),
    ({"response_format": schema_of({"$ref": "#"})}, "response_format"),
    ({"response_format": schema_of({"$ref": "#/$defs/nowhere"})}, "response_format"),
    ({"response_format": schema_of({"enum": []})}, "response_format"),
    ({"response_format": schema_of({"type": "integer", "multipleOf": 7})}, "response_format"),
    ({"response_format": schema_of(nested(50))}, "response_format"),
    ({"response_format": schema_of('{"a":' * 5000 + "1" + "}" * 5000)}, "response_format"),
    ({"response_format": pattern("((a{1,100}){1,100}){1,100}")}, "response_format"),
    ({"response_format": pattern("((")}, "response_format"),
    ({"response_format": pattern(r"(a)\1")}, "response_format"),
    ({"response_format": pattern("[a-z]{200}")}, "response_format"),
    ({"tools": TOOLS, "tool_choice": "function", "tool_name": "unknown"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "function"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": (Tool(name="f", parameters="5"),)}, "tools"),
    ({"tools": (Tool(name="f", parameters='{"type": "nonsense"}'),), "tool_choice": "required"}, "tools"),
    ({"tools": (Tool(name="f", parameters=json.dumps({"enum": ["x" * 70_000]})),)}, "tools"),
    ({"template": "[]"}, "template"),
    ({"template": '{"chat_template": "x"}'}, "template"),
    ({"template": '{"conversation": []}'}, "template"),
    ({"template": '{"tools": 5}'}, "template"),
    ({"reasoning_effort": "boundless"}, "reasoning_effort"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 2**60}, "logprobs"),
    ({"logit_bias": {"49152": 1.0}}, "logit_bias"),
    ({"response_format": schema_of({"enum": [2**70]})}, "response_format"),
    ({"response_format": schema_of({"type": "array", "uniqueItems": True})}, "response_format"),
    ({"template": json.dumps({"a": 2**70})}, "template"),
    ({"template": '{"messages": 5}'}, "template"),
    ({"template": '{"self": 1}'}, "template"),
    ({"tools": TOOLS, "tool_choice": "auto", "template": '{"chat_template": "x"}'}, "template"),
    ({"messages": (Message(role="user", content="\ud800"),), "tools": TOOLS}, "messages"),
    ({"tools": (Tool(name="f", parameters='{"type":"string","pattern":"(("}'),), **REQUIRED}, "tools"),
]


@pytest.mark.parametrize(("parameters", "param"), BAD)
async def test_an_invalid_request_is_rejected_and_the_engine_survives(
    engine: VllmEngine, parameters: dict[str, Any], param: str
) -> None:
    with anyio.fail_after(30), pytest.raises(InvalidRequest) as rejected:
        await ask(engine, **parameters)
    assert rejected.value.param == param
    assert rejected.value.message
    assert not INTERNAL.search(rejected.value.message)
    assert "object is not" not in rejected.value.message
    assert answer_of(await ask(engine, max_tokens=3)).text


BAD_CALL = ToolCall(id="", name="", arguments="[1")
ODD: Sequence[dict[str, Any]] = [
    {"tools": TOOLS, "response_format": CITY_FORMAT},
    {"tools": TOOLS, "tool_choice": "required", "response_format": CITY_FORMAT},
    {"tools": TOOLS * 20},
    {"tools": (Tool(name='"\n</tool_call>', parameters="{}"),), "tool_choice": "required"},
    {"tools": (Tool(name=""),), "tool_choice": "required"},
    {"tools": (Tool(name="f", parameters='{"type": "string"}'),), "tool_choice": "required"},
    {"logit_bias": {str(token_id): -100.0 for token_id in range(1024)}, "response_format": CITY_FORMAT},
    {"response_format": pattern("(a+)+$")},
    {"response_format": CITY_FORMAT, "presence_penalty": 2.0, "frequency_penalty": -2.0, "logprobs": 20},
    {"messages": (*QUESTION, Message(role="tool", content="x", tool_call_id="unknown"))},
    {"messages": (Message(role="assistant", tool_calls=(BAD_CALL,)), *QUESTION)},
]


@pytest.mark.parametrize("parameters", ODD)
async def test_odd_but_valid_requests_end_and_the_engine_survives(
    engine: VllmEngine, parameters: dict[str, Any]
) -> None:
    with anyio.fail_after(60):
        events = await ask(engine, **{"max_tokens": 8, **parameters})
    assert events[-1].reason in ("stop", "length", "tool_calls")
    assert answer_of(await ask(engine, max_tokens=3)).text


async def test_concurrent_requests_keep_their_grammars(engine: VllmEngine) -> None:
    answers: list[Any] = []

    async def one(number: int) -> None:
        parameters = (
            {"tools": TOOLS, "tool_choice": "function", "tool_name": "get_time"} if number % 2 else {}
        )
        asked = accepted(QUESTION, temperature=1.0, seed=number, max_tokens=60, **parameters)
        asked = msgspec.structs.replace(asked, request=f"r{number}")
        answers.append((number, answer_of(await run(engine, asked))))

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(one, number)
    for number, answer in answers:
        if number % 2:
            assert json.loads(answer.tool_calls[0].arguments)["zone"] in ("utc", "cet")
        else:
            assert answer.text
