"""Grammars with a model that reasons. It generates noise, except that a bias selects its first token."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events.schema import Message, ResponseFormat, Tool
from rift.engines.vllm import VllmEngine
from tests import tiny_model
from tests.rift.engines.conftest import MODEL, start, stop
from tests.rift.worker.answers import accepted, answer_of, past_of, run, tokens_of

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

REASONS = msgspec.structs.replace(
    MODEL, tool_parser="hermes", tool_strict_level="parameter", reasoning_parser="deepseek_r1"
)
QUESTION = (Message(role="user", content="one two"),)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
async def engine(
    anyio_backend: object, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[VllmEngine, int]]:
    del anyio_backend
    path = tiny_model.make(tmp_path_factory.mktemp("reasons"), marks=("<think>", "</think>"))
    end_id = _id_of("</think>", path)
    engine = await start(path, REASONS)
    yield engine, end_id
    await stop(engine)


def _id_of(token: str, path: Path) -> int:
    added = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    return int(next(entry["id"] for entry in added if entry["content"] == token))


async def ask(engine: tuple[VllmEngine, int], *, thinks: bool, **parameters: Any) -> list[Any]:
    running, end_id = engine
    bias = {str(end_id): -100.0 if thinks else 100.0}
    asked = accepted(QUESTION, **{"max_tokens": 60, "seed": 1, "logit_bias": bias, **parameters})
    return await run(running, asked)


async def test_everything_before_the_end_mark_is_reasoning(engine: tuple[VllmEngine, int]) -> None:
    events = await ask(engine, thinks=True, ignore_eos=True)
    answer = answer_of(events)
    assert (answer.text, bool(answer.reasoning)) == ("", True)
    assert events[-1].reasoning_tokens == events[-1].output_tokens == 60


async def test_a_grammar_begins_after_the_reasoning(engine: tuple[VllmEngine, int]) -> None:
    response_format = ResponseFormat(type="json_schema", schema=SCHEMA)
    constrained = await ask(engine, thinks=False, response_format=response_format, max_tokens=400)
    assert json.loads(answer_of(constrained).text)["a"] in (1, 2)
    assert (answer_of(constrained).reasoning, constrained[-1].reasoning_tokens, constrained[-1].reason) == (
        "",
        0,
        "stop",
    )
    thinking = await ask(engine, thinks=True, response_format=response_format, ignore_eos=True)
    assert answer_of(thinking).text == ""
    assert len(answer_of(thinking).reasoning) > 20


async def test_a_call_follows_reasoning(engine: tuple[VllmEngine, int]) -> None:
    tools = (Tool(name="f", parameters=SCHEMA),)
    events = await ask(
        engine, thinks=False, tools=tools, tool_choice="function", tool_name="f", max_tokens=400
    )
    (call,) = answer_of(events).tool_calls
    assert json.loads(call.arguments)["a"] in (1, 2)


async def test_another_attempt_continues_the_reasoning(engine: tuple[VllmEngine, int]) -> None:
    running, end_id = engine
    bias = {str(end_id): -100.0}
    asked = accepted(QUESTION, max_tokens=40, temperature=0.0, ignore_eos=True, logit_bias=bias)
    begun = tokens_of(await run(running, asked))[:15]
    rest = await run(running, asked, past_of(begun))
    answer = answer_of([*begun, *rest])
    assert answer.text == ""
    assert answer.reasoning.startswith(answer_of(begun).reasoning)
    assert rest[-1].reasoning_tokens == rest[-1].output_tokens == 40
