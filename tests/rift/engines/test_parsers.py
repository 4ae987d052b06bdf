"""vLLM's own parsers on scripted answers: no engine runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from events.schema import Message, Parameters, Tool
from rift.engines import Delta, Parser
from rift.engines.chat import VllmParser, chat_request
from rift.engines.sim import SimDecoder
from rift.engines.tokens import Tokenizer
from rift.engines.vllm import _import
from rift.worker.attempt import NotContinuable
from tests.rift.engines.conftest import PROFILE
from tests.rift.worker.answers import accepted, answer_of, past_of, run, tokens_of
from tests.scripted_engine import ScriptedEngine

# torch and vLLM warn about each other's deprecated features during import.
pytestmark = [pytest.mark.engine, pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
DEEPSEEK = [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")]
WEATHER = Tool(name="get_weather", parameters='{"type":"object","properties":{"city":{"type":"string"}}}')
ARGUMENTS = [{"city": "Zürich 🌊"}, {"city": "}</tool_call"}]
WRITTEN = [json.dumps(arguments, ensure_ascii=False) for arguments in ARGUMENTS]
HERMES = "Let me see.\n" + "".join(
    f'<tool_call>\n{{"name": "get_weather", "arguments": {written}}}\n</tool_call>' for written in WRITTEN
)
DEEPSEEK_V3 = (
    "Let me see.\n<｜tool▁calls▁begin｜>"
    + "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{written}\n```<｜tool▁call▁end｜>"
        for written in WRITTEN
    )
    + "<｜tool▁calls▁end｜>"
)
THOUGHT = "I should look 🙂 <b>"


@pytest.fixture(scope="module")
def hf(tiny: Path) -> Any:
    _import(str(tiny), PROFILE)
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=True) for mark in DEEPSEEK])
    return tokenizer


def scripted(
    hf: Any, text: str, *, tools: str | None, reasoning: str | None, parameters: Parameters, prompt: str = "x"
) -> ScriptedEngine:
    """Return an engine that generates `text` and parses it with the parsers of these names."""
    from vllm.parser import ParserManager

    ids = hf.encode(text, add_special_tokens=False)
    assert hf.decode(ids) == text
    parser_class = ParserManager.get_parser(
        tool_parser_name=tools, reasoning_parser_name=reasoning, enable_auto_tools=True, tokenizer=hf
    )

    def parser() -> Parser:
        request = chat_request((Message(role="user", content="x"),), parameters)
        request.skip_special_tokens = False
        decoder = Tokenizer(hf).decoder(special=True)
        return VllmParser(parser_class(hf, request.tools), request, hf.encode(prompt), decoder)

    return ScriptedEngine([*ids, hf.eos_token_id], decoder=Tokenizer(hf).decoder, parser=parser)


async def assert_any_cut(engine: ScriptedEngine, asked: Any) -> tuple[Delta, Any]:
    """Check that every cut gives the same answer; return the answer and its end."""
    whole = await run(engine, asked)
    answer, end = answer_of(whole), whole[-1]
    for step_tokens in (2, 7, 1000):
        engine.step_tokens = step_tokens
        assert answer_of(await run(engine, asked)) == answer, f"in steps of {step_tokens}"
    engine.step_tokens = 1
    logged = tokens_of(whole)
    for cut in range(1, len(logged)):
        begun = logged[:cut]
        rest = await run(engine, asked, past_of(begun))
        assert answer_of([*begun, *rest]) == answer, f"cut at {cut}"
        ends = [(last.reason, last.output_tokens, last.reasoning_tokens) for last in (rest[-1], end)]
        assert ends[0] == ends[1]
    # A lane's writer joins events, so the log has other cuts than the engine.
    first, second = (logged[: len(logged) // 2], logged[len(logged) // 2 : -1])
    joined = [
        msgspec.structs.replace(
            part[0],
            token_ids=tuple(token_id for event in part for token_id in event.token_ids),
            text=answer_of(part).text,
            reasoning=answer_of(part).reasoning,
            tool_calls=tuple(call for event in part for call in event.tool_calls),
        )
        for part in (first, second)
        if part
    ]
    assert answer_of([*joined, *await run(engine, asked, past_of(joined))]) == answer
    return answer, end


@pytest.mark.parametrize(("tools", "calls"), [("hermes", HERMES), ("deepseek_v3", DEEPSEEK_V3)])
@pytest.mark.parametrize("stop", [(), ("</think>\nEND", "<tool_call>END")])
async def test_reasoning_and_calls_cut_at_every_token(
    hf: Any, tools: str, calls: str, stop: tuple[str, ...]
) -> None:
    text = f"<think>{THOUGHT}</think>\n{calls}"
    asked = accepted(tools=(WEATHER,), stop=stop, max_tokens=1000)
    engine = scripted(hf, text, tools=tools, reasoning="deepseek_r1", parameters=asked.parameters)
    answer, end = await assert_any_cut(engine, asked)
    assert answer.reasoning == THOUGHT
    assert "Let me see." in answer.text
    assert "<" not in answer.text
    assert "｜" not in answer.text
    assert [(call.index, call.name) for call in answer.tool_calls] == [(0, "get_weather"), (1, "get_weather")]
    assert [json.loads(call.arguments) for call in answer.tool_calls] == ARGUMENTS
    assert len({call.id for call in answer.tool_calls}) == 2
    assert end.reason == "tool_calls"
    assert end.reasoning_tokens == len(hf.encode(THOUGHT))


async def test_the_prompt_may_have_the_first_mark(hf: Any) -> None:
    asked = accepted(max_tokens=1000)
    engine = scripted(
        hf,
        f"{THOUGHT}</think>An answer.",
        tools=None,
        reasoning="deepseek_r1",
        parameters=asked.parameters,
        prompt="x<think>\n",
    )
    answer, end = await assert_any_cut(engine, asked)
    assert (answer.reasoning, answer.text) == (THOUGHT, "An answer.")
    assert (end.reason, end.reasoning_tokens) == ("stop", len(hf.encode(THOUGHT)))


async def test_without_parallel_calls_only_the_first_call_remains(hf: Any) -> None:
    asked = accepted(tools=(WEATHER,), parallel_tool_calls=False, max_tokens=1000)
    engine = scripted(hf, HERMES, tools="hermes", reasoning=None, parameters=asked.parameters)
    answer, end = await assert_any_cut(engine, asked)
    (call,) = answer.tool_calls
    assert json.loads(call.arguments) == ARGUMENTS[0]
    assert end.reason == "tool_calls"


NAMED = {"tool_choice": "function", "tool_name": "get_weather"}
PYTHONIC = '[get_weather(city="Zürich 🌊", days=[1, None]), get_weather(city="}</tool_call", days=2)]'


@pytest.mark.parametrize(
    ("tools", "text", "choice"),
    [
        ("hermes", HERMES, {}),
        ("hermes", HERMES, {"tool_choice": "required"}),
        ("hermes", HERMES.partition("</tool_call>")[0], NAMED),
        ("deepseek_v3", DEEPSEEK_V3, {}),
        ("llama4_pythonic", PYTHONIC, {}),
        (
            "llama4_pythonic",
            f'[{{"name": "get_weather", "parameters": {WRITTEN[0]}}}]',
            {"tool_choice": "required"},
        ),
        ("llama4_pythonic", WRITTEN[0], NAMED),
    ],
)
async def test_an_answer_cut_at_any_token_shows_only_what_the_model_wrote(
    hf: Any, tools: str, text: str, choice: dict[str, str]
) -> None:
    text = f"<think>{THOUGHT}</think>{text}"
    ids = hf.encode(text, add_special_tokens=False)

    async def answer(max_tokens: int) -> tuple[Delta, str]:
        asked = accepted(tools=(WEATHER,), max_tokens=max_tokens, **choice)
        engine = scripted(hf, text, tools=tools, reasoning="deepseek_r1", parameters=asked.parameters)
        events = await run(engine, asked)
        return answer_of(events), events[-1].reason

    whole, _ = await answer(1000)
    assert whole.tool_calls
    assert all(json.loads(call.arguments) for call in whole.tool_calls)
    for cut in range(1, len(ids) + 1):
        shown, reason = await answer(cut)
        assert reason == "length"
        assert whole.reasoning.startswith(shown.reasoning.rstrip("\ufffd")), f"cut at {cut}"
        assert whole.text.startswith(shown.text.rstrip("\ufffd")), f"cut at {cut}"
        calls = zip(shown.tool_calls, whole.tool_calls[: len(shown.tool_calls)], strict=True)
        for call, entire in calls:
            assert (call.id, call.name) == (entire.id, entire.name)
            # A character that is cut is shown as U+FFFD.
            assert entire.arguments.startswith(call.arguments.rstrip("\ufffd")), f"cut at {cut}"


async def test_an_answer_with_different_logged_reasoning_is_not_continued(hf: Any) -> None:
    asked = accepted(max_tokens=1000)
    engine = scripted(
        hf, "<think>a</think>b", tools=None, reasoning="deepseek_r1", parameters=asked.parameters
    )
    begun = tokens_of(await run(engine, asked))[:3]
    for changed in ({"reasoning": "x"}, {"text": "x"}):
        with pytest.raises(NotContinuable):
            await run(engine, asked, past_of([*begun[:2], msgspec.structs.replace(begun[2], **changed)]))


@pytest.mark.parametrize(
    "text", ["<tool_call>", "<tool_call>}{</tool_call>", "<tool_call>[1]</tool_call>", "</tool_call></think>"]
)
async def test_odd_answers_are_read_without_errors(hf: Any, text: str) -> None:
    asked = accepted(tools=(WEATHER,), max_tokens=1000)
    for name, reasoning in (("hermes", None), ("deepseek_v3", "deepseek_r1"), ("llama4_pythonic", None)):
        engine = scripted(hf, text, tools=name, reasoning=reasoning, parameters=asked.parameters)
        await assert_any_cut(engine, asked)


async def test_after_a_parser_error_the_rest_is_content(hf: Any) -> None:
    class Raises:
        reasoning_parser = None

        def parse_delta(self, *, delta_text: str, **others: Any) -> Any:
            del others
            raise ZeroDivisionError(delta_text)

    request = chat_request((Message(role="user", content="x"),), Parameters(tools=(WEATHER,)))
    parser = VllmParser(Raises(), request, [1], Tokenizer(hf).decoder())
    assert parser.feed("one", [5]) == Delta("one")
    assert parser.feed(" two", [6], "complete") == Delta(" two")


def test_half_a_surrogate_pair_in_a_call_is_escaped_again() -> None:
    class Writes:
        def parse_delta(self, **others: Any) -> Any:
            del others
            function = SimpleNamespace(name="get_weather", arguments='{"city": "Zürich \ud83d"}')
            call = SimpleNamespace(index=0, id="1", function=function)
            return SimpleNamespace(content=None, reasoning=None, tool_calls=[call])

    parser = VllmParser(Writes(), SimpleNamespace(parallel_tool_calls=None), [1], SimDecoder())
    (call,) = parser.feed("x", [5]).tool_calls
    assert call.arguments == '{"city": "Zürich \\ud83d"}'


def test_vllm_has_every_parser_of_the_catalogue(hf: Any) -> None:
    from vllm.parser import ParserManager

    from rift import catalogue

    del hf
    for model in catalogue.shipped().values():
        parser_class = ParserManager.get_parser(
            tool_parser_name=model.tool_parser or None,
            reasoning_parser_name=model.reasoning_parser or None,
            enable_auto_tools=True,
            tool_strict_level=model.tool_strict_level,
        )
        assert parser_class is not None
        assert (parser_class.tool_parser_cls is not None) == bool(model.tool_parser)
        assert (parser_class.reasoning_parser_cls is not None) == bool(model.reasoning_parser)
