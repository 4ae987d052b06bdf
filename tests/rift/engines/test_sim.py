"""The simulated engine: same prompt and seed, same answer, at its pace, from any starting point."""

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from events.schema import Message, Parameters, ResponseFormat, Tool
from rift.catalogue import Model, Pace, Profile
from rift.engines import Engine, InvalidRequest, Rendered, Step
from rift.engines.sim import ENDINGS, SENTENCE_TOKENS, WORD_IDS_FROM, SimEngine

MODEL = Model(source="sim", context_tokens=4096, prompt_usd="0.01", output_usd="0.02")


class Clock:
    """Time that passes only in `sleep`, and there `late_s` longer than requested."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s, self.late_s = 100.0, late_s

    async def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds + self.late_s

    def now(self) -> float:
        return self.now_s


def engine_on(clock: Clock, **pace: int) -> SimEngine:
    return SimEngine(MODEL, Profile(sim=Pace(**pace)), sleep=clock.sleep, now=clock.now)


def run(
    engine: SimEngine,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    seed: int | None = None,
    max_tokens: int = 40,
) -> list[Step]:
    async def collect() -> list[Step]:
        steps: list[Step] = []

        def emit(step: Step) -> bool:
            steps.append(step)
            return True

        rendered = Rendered(prompt, Parameters(seed=seed))
        await engine.generate("a", rendered, output, max_tokens=max_tokens, salt="s", emit=emit)
        return steps

    return anyio.run(collect)


def ids_of(steps: list[Step]) -> list[int]:
    return [token_id for step in steps for token_id in step.token_ids]


def text_of(engine: SimEngine, ids: Sequence[int]) -> str:
    decoder = engine.decoder()
    return "".join(map(decoder.feed, ids)) + decoder.flush()


def test_it_is_an_engine_and_marked_as_simulated() -> None:
    engine: Engine = SimEngine(MODEL, Profile(args={"max_num_seqs": 7}))
    assert (engine.name, engine.simulated, engine.model_digest) == ("sim", True, "simulated")
    assert (engine.slots, engine.context_tokens) == (7, 4096)
    assert SimEngine(MODEL).slots == 64


def test_it_runs_to_max_tokens_and_only_the_last_step_has_a_finish() -> None:
    steps = run(engine_on(Clock()), [1, 2], max_tokens=40)
    assert len(ids_of(steps)) == 40
    assert [step.finish for step in steps] == [None] * (len(steps) - 1) + ["length"]


def test_the_context_bounds_an_answer() -> None:
    steps = run(engine_on(Clock()), [1] * 4000, [300] * 90, max_tokens=40)
    assert len(ids_of(steps)) == 6
    assert steps[-1].finish == "length"
    with pytest.raises(InvalidRequest) as rejected:
        run(engine_on(Clock()), [1] * 4000, [300] * 96)
    assert (rejected.value.code, rejected.value.param) == ("context_length_exceeded", "prompt")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.none() | st.integers(), st.integers(0, 40))
def test_a_continuation_equals_the_rest_of_the_first_attempt(
    prompt: list[int], seed: int | None, cut: int
) -> None:
    whole = ids_of(run(engine_on(Clock()), prompt, seed=seed, max_tokens=41))
    rest = run(engine_on(Clock(late_s=0.1)), prompt, whole[:cut], seed=seed, max_tokens=41 - cut)
    assert whole[:cut] + ids_of(rest) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["enum", "type", "properties", "required", "minimum", "a"]), inner, max_size=4
        )
    ),
)


@given(JSON)
@example({"enum": []})
@example({"enum": {}})
@example({"properties": {"a": True}, "required": ["a"]})
@example({"required": 5})
def test_a_schema_is_answered_or_refused(schema: Any) -> None:
    text = json.dumps(schema)
    asked = Parameters(response_format=ResponseFormat(type="json_schema", schema=text))
    with suppress(InvalidRequest):
        rendered = anyio.run(partial(SimEngine(MODEL).render, "x", asked, raw=False, tokens_max=10))
        json.loads(rendered.private.json)


@pytest.mark.parametrize("schema", ['{"enum": []}', '{"properties": 5, "required": ["a"]}', "[]", "{"])
def test_a_schema_that_cannot_be_read_is_invalid(schema: str) -> None:
    asked = Parameters(response_format=ResponseFormat(type="json_schema", schema=schema))
    with pytest.raises(InvalidRequest, match="a schema that the simulated engine cannot read") as refused:
        anyio.run(partial(SimEngine(MODEL).render, "x", asked, raw=False, tokens_max=10))
    assert (refused.value.code, refused.value.param) == ("invalid_value", "response_format")


def test_prompt_and_seed_change_the_answer() -> None:
    engine = engine_on(Clock())
    answers = [
        run(engine, [1]),
        run(engine, [2]),
        run(engine, [1], seed=0),
        run(engine, [1], seed=1),
        run(engine, [1, 1]),
    ]
    assert len({tuple(ids_of(answer)) for answer in answers}) == len(answers)


def test_the_pace_does_not_drift() -> None:
    """Each sleep is 3 ms late, and 500 tokens at 50 a second still take 10 s."""
    clock = Clock(late_s=0.003)
    run(engine_on(clock), [1], max_tokens=500)
    assert clock.now_s - 100.0 == pytest.approx(10.0, abs=0.004)


def test_a_late_step_carries_every_due_token() -> None:
    clock = Clock(late_s=0.1)
    steps = run(engine_on(clock, step_us=10_000), [1], max_tokens=100)
    assert {len(step.token_ids) for step in steps[:-1]} <= {10, 11, 12}
    assert clock.now_s - 100.0 == pytest.approx(1.0, abs=0.11)


def test_it_stops_once_emit_returns_false() -> None:
    clock = Clock()
    steps: list[Step] = []

    def emit(step: Step) -> bool:
        steps.append(step)
        return False

    rendered = Rendered([1], Parameters())
    anyio.run(partial(engine_on(clock).generate, "a", rendered, [], max_tokens=10, salt="s", emit=emit))
    assert len(steps) == 1
    assert clock.now_s < 100.1


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("", 1), ("a", 1), ("abcd", 1), ("abcde", 2), ("🌊", 1), ("a🌊", 2), ("x" * 8192, 2048)],
)
def test_a_prompt_has_one_token_for_every_four_bytes(prompt: str, tokens: int) -> None:
    assert len(SimEngine(MODEL).encode(prompt, raw=False, tokens_max=100_000)) == tokens


def test_messages_are_encoded_by_their_content() -> None:
    engine = SimEngine(MODEL)
    messages = (Message(role="system", content="ab"), Message(role="user", content="cd"))
    assert engine.encode(messages, raw=False, tokens_max=100_000) == engine.encode(
        "ab\ncd", raw=True, tokens_max=100_000
    )


@pytest.mark.parametrize(
    ("prompt", "param"), [("\ud800", "prompt"), ((Message(role="user", content="\ud800"),), "messages")]
)
def test_invalid_unicode_is_rejected(prompt: str | tuple[Message, ...], param: str) -> None:
    with pytest.raises(InvalidRequest) as rejected:
        SimEngine(MODEL).encode(prompt, raw=False, tokens_max=100_000)
    assert rejected.value.param == param


def test_the_text_has_words_and_characters_of_several_tokens() -> None:
    engine = engine_on(Clock())
    ids = ids_of(run(engine, [1], max_tokens=3200))
    assert {token_id < WORD_IDS_FROM for token_id in ids} == {True, False}
    text = text_of(engine, ids)
    assert "\ufffd" not in text
    assert all(ending.decode() in text for ending in ENDINGS)
    assert all(len(ending) < SENTENCE_TOKENS for ending in ENDINGS)


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    assert text_of(SimEngine(MODEL), [256, *"🌊".encode()[:3], 256]) == " a\ufffd a"
    assert text_of(SimEngine(MODEL), [256, *"🌊".encode()[:3]]) == " a\ufffd"


def test_a_profile_sets_the_pace() -> None:
    profile = Profile(args={"max_num_seqs": 7}, sim=Pace(running_max=3))
    assert SimEngine(MODEL, profile).slots == 3
    clock = Clock()
    run(engine_on(clock, step_us=2000, step_us_per_running=1000, prefill_tokens_per_s=100), [1] * 50)
    assert clock.now_s - 100.0 == pytest.approx(0.5 + 40 * 0.003, abs=0.001)


@pytest.mark.anyio
async def test_running_requests_share_each_step() -> None:
    """10 ms a step and 10 ms for each running request: 20 ms a token for one, 30 ms for two."""
    engine = SimEngine(MODEL, Profile(sim=Pace(step_us=10_000, step_us_per_running=10_000)))
    took_s: dict[str, float] = {}

    async def one(name: str, tokens: int) -> None:
        began = anyio.current_time()
        await engine.generate(
            name, Rendered([1], Parameters()), [], max_tokens=tokens, salt="", emit=lambda step: True
        )
        took_s[name] = anyio.current_time() - began

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one, "long", 30)
        tasks.start_soon(one, "short", 10)
    assert took_s["short"] == pytest.approx(10 * 0.03, abs=0.06)
    assert took_s["long"] == pytest.approx(10 * 0.03 + 20 * 0.02, abs=0.1)


@pytest.mark.anyio
async def test_prompts_are_read_one_at_a_time_and_a_start_takes_time() -> None:
    began = anyio.current_time()
    pace = Pace(step_us=1, prefill_tokens_per_s=1000, start_ms=100)
    engine = await SimEngine.start(MODEL, Profile(sim=pace))
    async with anyio.create_task_group() as tasks:
        for name in "abc":
            run_one = partial(engine.generate, max_tokens=1, salt="", emit=lambda step: True)
            tasks.start_soon(run_one, name, Rendered([1] * 100, Parameters()), [])
    assert anyio.current_time() - began == pytest.approx(0.1 + 3 * 0.1, abs=0.1)


# --- answers that the request prescribes ---------------------------------------------------------


def forced(parameters: Parameters) -> list[Step]:
    engine = engine_on(Clock())
    steps: list[Step] = []

    def emit(step: Step) -> bool:
        steps.append(step)
        return True

    async def ask() -> None:
        rendered = await engine.render("any", parameters, raw=False, tokens_max=100_000)
        await engine.generate("a", rendered, [], max_tokens=1000, salt="s", emit=emit)

    anyio.run(ask)
    return steps


def test_json_is_the_smallest_value_that_satisfies_its_schema() -> None:
    properties = {
        "text": {"type": "string"},
        "one_of": {"enum": ["b", "a"]},
        "count": {"type": "integer", "minimum": 3},
        "yes": {"type": "boolean"},
        "list": {"type": "array"},
        "inner": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        "nothing": {"type": "null"},
        "not required": {"type": "string"},
    }
    required = [name for name in properties if name != "not required"]
    schema = json.dumps({"type": "object", "properties": properties, "required": required})
    parameters = Parameters(response_format=ResponseFormat(type="json_schema", schema=schema))
    steps = forced(parameters)
    assert json.loads(text_of(engine_on(Clock()), ids_of(steps))) == {
        "text": "",
        "one_of": "b",
        "count": 3,
        "yes": False,
        "list": [],
        "inner": {"x": 0},
        "nothing": None,
    }
    assert steps[-1].finish == "stop"


@pytest.mark.parametrize("schema", ["{", "[]", '{"properties": 5, "required": ["a"]}', "[" * 100_000])
def test_an_invalid_schema_is_rejected(schema: str) -> None:
    with pytest.raises(InvalidRequest) as rejected:
        forced(Parameters(response_format=ResponseFormat(type="json_schema", schema=schema)))
    assert rejected.value.param == "response_format"


def test_a_forced_tool_must_be_in_tools() -> None:
    with pytest.raises(InvalidRequest) as rejected:
        forced(Parameters(tools=(Tool(name="f"),), tool_choice="function", tool_name="g"))
    assert rejected.value.param == "tool_choice"


def test_each_token_has_logprobs_and_is_its_own_likeliest() -> None:
    engine = engine_on(Clock())
    steps: list[Step] = []

    def emit(step: Step) -> bool:
        steps.append(step)
        return True

    for count in (0, 3):
        steps.clear()
        rendered = Rendered([1], Parameters(logprobs=count))
        anyio.run(partial(engine.generate, "a", rendered, [], max_tokens=40, salt="s", emit=emit))
        logprobs = [logprob for step in steps for logprob in step.logprobs]
        assert len(logprobs) == 40
        assert all(len(logprob.top) == count for logprob in logprobs)
        assert all(not count or logprob.top[0].token == logprob.token for logprob in logprobs)
