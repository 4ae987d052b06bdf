"""An answer that is cut at any token and continued by another attempt equals the uninterrupted one."""

import json
from typing import Any

import msgspec
import pytest

from events.schema import RequestFinished, ResponseFormat, TokensGenerated, Tool
from rift.catalogue import Model, Pace, Profile
from rift.engines import InvalidRequest
from rift.engines.sim import SimDecoder, SimEngine
from rift.worker.attempt import NotContinuable
from rift.worker.detokenizer import Detokenizer
from rift.worker.prompt import prepare, prepare_or_refuse
from tests.rift.worker import answers
from tests.rift.worker.answers import answer_of, ids_of, past_of, run, tokens_of
from tests.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

MODEL = Model(source="sim", context_tokens=4096, prompt_usd="0.01", output_usd="0.02")
TOKENS = 80
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
}
WEATHER = Tool(name="get_weather", parameters=json.dumps(SCHEMA))
TRIP_FORMAT = ResponseFormat(type="json_schema", schema=json.dumps(SCHEMA))


def accepted(prompt: Any = "tell me", **parameters: Any) -> Any:
    return answers.accepted(prompt, **{"max_tokens": TOKENS, **parameters})


def sim() -> SimEngine:
    return SimEngine(MODEL, Profile(sim=Pace(step_us=1)))


async def log_of(asked: Any) -> tuple[list[Any], list[TokensGenerated]]:
    """Return an uninterrupted answer, and the same token by token, as from a slow engine."""
    events = await run(sim(), asked)
    text = Detokenizer(SimDecoder(), asked.parameters.stop)
    single: list[TokensGenerated] = []
    for index, token_id in enumerate(ids_of(events)):
        _, piece = text.feed([token_id])
        single.append(TokensGenerated(attempt="a", index=index, token_ids=(token_id,), text=piece))
    return events, single


@pytest.mark.parametrize("prompt", ["tell me", "水は流れる", "more of it 🙂"])
@pytest.mark.parametrize("stop", [(), ("🌊",), (" the", "。水"), ("never in it",)])
async def test_cut_at_every_token(prompt: str, stop: tuple[str, ...]) -> None:
    asked = accepted(prompt, stop=stop, seed=3)
    whole, single = await log_of(asked)
    text = "".join(event.text for event in tokens_of(whole))
    for cut in range(1, len(single)):
        rest = await run(sim(), asked, past_of(single[:cut]))
        logged = "".join(event.text for event in single[:cut])
        assert logged + "".join(event.text for event in tokens_of(rest)) == text, f"cut at {cut}"
        assert ids_of(rest) == ids_of(whole)[cut:]
        assert (rest[-1].reason, rest[-1].output_tokens) == (whole[-1].reason, whole[-1].output_tokens)


async def test_a_complete_answer_is_ended_without_the_engine() -> None:
    asked = accepted(seed=3)
    _, single = await log_of(asked)
    (end,) = await run(sim(), asked, past_of(single))
    assert isinstance(end, RequestFinished)
    assert (end.reason, end.output_tokens) == ("length", TOKENS)


async def test_an_answer_may_have_no_token() -> None:
    (end,) = await run(sim(), accepted(max_tokens=0))
    assert (end.reason, end.output_tokens) == ("length", 0)


async def test_an_answer_with_different_logged_text_is_not_continued() -> None:
    event = TokensGenerated(attempt="a", index=0, token_ids=(300,), text="something else")
    with pytest.raises(NotContinuable):
        await run(sim(), accepted(), past_of([event]))


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
async def test_penalties_over_output_tokens_are_not_continued(penalty: str) -> None:
    _, single = await log_of(accepted())
    with pytest.raises(NotContinuable):
        await run(sim(), accepted(**{penalty: 0.5}), past_of(single[:1]))


@pytest.mark.parametrize(
    ("prompt", "parameters", "code", "asked"),
    [
        (
            4096,
            {"max_tokens": None},
            "prompt_too_long",
            "at least 4097 tokens (4096 in the prompt, 1 in the completion)",
        ),
        (1000, {"max_tokens": 3097}, "max_tokens_too_large", "4097 tokens (1000 in the prompt, 3097 in"),
        (1, {"max_tokens": 4096}, "max_tokens_too_large", "4097 tokens (1 in the prompt, 4096 in"),
    ],
)
async def test_a_prompt_or_limit_that_does_not_fit_is_invalid(
    prompt: int, parameters: dict[str, int], code: str, asked: str
) -> None:
    for kind in ("inference", "chat"):
        too_long = msgspec.structs.replace(accepted("x" * 4 * prompt, **parameters), kind=kind)
        with pytest.raises(InvalidRequest) as refused:
            await prepare(SimEngine(MODEL), too_long)
        assert refused.value.code == code
        begin = "This model's maximum context length is 4096 tokens. However, you requested "
        assert refused.value.message.startswith(begin + asked)


async def test_an_error_of_the_engine_while_it_reads_a_prompt_stays_in_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def encode(*args: Any, **more: Any) -> list[int]:
        raise KeyError("vocabulary")

    engine = SimEngine(MODEL)
    monkeypatch.setattr(engine, "encode", encode)
    refusal = (await prepare_or_refuse(engine, accepted())).refusal
    assert refusal is not None
    assert (refusal[0], refusal[1].code) == ("failed", "prompt_unreadable")
    assert "KeyError" not in refusal[1].message


async def test_a_reservation_of_fewer_tokens_does_not_claim_that_the_context_is_full() -> None:
    asked = msgspec.structs.replace(accepted("x" * 4 * 100), kind="chat", prompt_tokens_max=99)
    with pytest.raises(InvalidRequest, match=r"^the prompt has 100 tokens; the limit is 99$"):
        await prepare(SimEngine(MODEL), asked)


@pytest.mark.parametrize(("limit", "has_remedy"), [(99, True), (4096, False)])
async def test_the_native_routes_own_limit_names_the_routes_that_accept_more(
    limit: int, has_remedy: bool
) -> None:
    asked = msgspec.structs.replace(accepted("x" * 4 * 4096), prompt_tokens_max=limit)
    with pytest.raises(InvalidRequest) as refused:
        await prepare(SimEngine(MODEL), asked)
    assert (refused.value.code, refused.value.param) == ("prompt_too_long", "prompt")
    assert ("99 tokens is the limit of /v1/inference" in refused.value.message) is has_remedy
    assert ("/v1/chat/completions" in refused.value.message) is has_remedy


# --- tool calls, grammars and logprobs ------------------------------------------------------------


async def test_a_forced_call_has_no_text_and_the_same_id_in_every_attempt() -> None:
    asked = accepted(tools=(WEATHER,), tool_choice="required")
    whole = await run(sim(), asked)
    answer = answer_of(whole)
    (call,) = answer.tool_calls
    assert (answer.text, call.name, json.loads(call.arguments)) == (
        "",
        "get_weather",
        {"city": "", "days": 1},
    )
    assert call.id is not None
    assert call.id.startswith("call_")
    assert whole[-1].reason == "tool_calls"
    for cut in range(1, len(ids_of(whole))):
        cut_short = await run(sim(), accepted(tools=(WEATHER,), tool_choice="required", max_tokens=cut))
        rest = await run(sim(), asked, past_of(tokens_of(cut_short)))
        assert answer_of([*cut_short, *rest]) == answer, f"cut at {cut}"
        assert (cut_short[-1].reason, rest[-1].reason) == ("length", "tool_calls")


async def test_a_named_tool_call_ends_with_stop() -> None:
    asked = accepted(tools=(WEATHER,), tool_choice="function", tool_name="get_weather")
    assert (await run(sim(), asked))[-1].reason == "stop"


async def test_an_answer_with_different_logged_calls_is_not_continued() -> None:
    asked = accepted(tools=(WEATHER,), tool_choice="required")
    event = tokens_of(await run(sim(), accepted(tools=(WEATHER,), tool_choice="required", max_tokens=9)))[0]
    text_instead = TokensGenerated(attempt="a", index=0, token_ids=event.token_ids, text='{"city": ')
    with pytest.raises(NotContinuable):
        await run(sim(), asked, past_of([text_instead]))


async def test_the_simulated_engine_returns_the_requested_json() -> None:
    answer = answer_of(await run(sim(), accepted(response_format=TRIP_FORMAT)))
    assert json.loads(answer.text) == {"city": "", "days": 1}


async def test_an_answer_under_a_grammar_is_continued_only_before_its_first_token() -> None:
    engine = ScriptedEngine(b"{}", grammar=True)
    whole = await run(engine, accepted(), past_of([]))
    assert answer_of(whole).text == "{}"
    with pytest.raises(NotContinuable, match="grammar"):
        await run(engine, accepted(), past_of(tokens_of(whole)[:1]))


async def test_each_id_of_the_answer_has_logprobs() -> None:
    engine = ScriptedEngine(b"to be END or not", step_tokens=5)
    events = await run(engine, accepted(logprobs=1, stop=("END",)))
    logprobs = [logprob.token for event in tokens_of(events) for logprob in event.logprobs]
    assert logprobs == [str(token_id) for token_id in b"to be END"]
    assert not any(event.logprobs for event in tokens_of(await run(engine, accepted())))


async def test_an_engine_that_aborts_a_request_fails_only_that_one() -> None:
    events = await run(ScriptedEngine(b"half an answ", finish=None), accepted())
    assert (events[-1].reason, events[-1].error.code) == ("failed", "engine_gave_up")
