"""The real engine: vLLM with a tiny model, one for all tests, and another one to kill."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from events.schema import Message, Parameters, ResponseFormat, Tool
from rift.catalogue import Profile
from rift.engines import Engine, EngineFailed, InvalidRequest, PromptTooLong, Rendered, Step, vllm
from rift.engines.prepare import digest_of
from rift.engines.vllm import VllmEngine
from rift.metrics.engine import EngineMetrics
from tests.rift.engines.conftest import MODEL, start, stop
from tests.rift.worker.answers import accepted, answer_of, past_of, run, tokens_of

psutil = pytest.importorskip("psutil")  # it comes with vLLM
pytestmark = [pytest.mark.engine, pytest.mark.anyio]

EOS = 2
GREEDY = Parameters(temperature=0.0, ignore_eos=True)


async def steps(
    engine: Engine,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    parameters: Parameters = GREEDY,
    *,
    max_tokens: int = 16,
    salt: str = "account",
    attempt: str = "attempt",
) -> list[Step]:
    received: list[Step] = []

    def emit(step: Step) -> bool:
        received.append(step)
        return True

    rendered = Rendered(prompt, parameters)
    await engine.generate(attempt, rendered, output, max_tokens=max_tokens, salt=salt, emit=emit)
    return received


def ids_of(got: list[Step]) -> list[int]:
    return [token_id for step in got for token_id in step.token_ids]


async def assert_idle(engine: VllmEngine) -> None:
    """Check that no request is left here or, once it has read the abort, in vLLM's engine."""
    assert engine._client.running == 0
    with anyio.fail_after(2):
        await engine._llm.pause_generation(mode="wait")
    await engine._llm.resume_generation()


# --- answers -------------------------------------------------------------------------------------


async def test_its_metrics_are_vllms_own(engine: VllmEngine) -> None:
    def scraped() -> dict[tuple[str, str], float]:
        return {
            (sample.name, sample.labels.get("finished_reason", "")): sample.value
            for metric in EngineMetrics(engine.log_metrics).collect()
            for sample in metric.samples
            if "le" not in sample.labels and sample.labels.get("model_name", "tiny") == "tiny"
        }

    async def abort_after(tokens: int) -> None:
        seen = 0

        def emit(step: Step) -> bool:
            nonlocal seen
            seen += len(step.token_ids)
            return seen < tokens

        rendered = Rendered(range(20, 60), GREEDY)
        await engine.generate("aborted", rendered, [], max_tokens=64, salt="a", emit=emit)

    before = scraped()
    await steps(engine, range(10, 50), max_tokens=7)
    await abort_after(3)
    after = scraped()
    grown = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    assert grown["vllm:generation_tokens_total", ""] == 10
    assert grown["vllm:prompt_tokens_total", ""] == 80
    assert grown["vllm:prefix_cache_queries_total", ""] == 80
    assert grown["vllm:request_success_total", "length"] == 1
    assert grown["vllm:request_success_total", "abort"] == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert grown[f"vllm:{name}_count", ""] == 2
        assert 0 < grown[f"vllm:{name}_sum", ""] < 60
    assert ("vllm:num_requests_running", "") in after
    assert not any("inter_token" in name or "created" in name for name, _ in after)
    assert {key: value for key, value in scraped().items() if key[0].endswith("_total")} == {
        key: value for key, value in after.items() if key[0].endswith("_total")
    }


async def test_its_attributes(engine: VllmEngine, tiny: Path) -> None:
    assert (engine.name, engine.simulated, engine.slots) == ("vllm", False, 64)
    assert engine.context_tokens == MODEL.context_tokens
    assert engine.model_digest == digest_of(tiny)


async def test_it_runs_to_max_tokens_and_only_the_last_step_has_a_finish(engine: VllmEngine) -> None:
    got = await steps(engine, [5, 6, 7], max_tokens=40)
    assert len(ids_of(got)) == 40
    assert [step.finish for step in got] == [None] * (len(got) - 1) + ["length"]


async def test_a_continuation_follows_prompt_and_logged_ids(engine: VllmEngine) -> None:
    prompt, output = [5, 6, 7], [300, 301, 302]
    continued = ids_of(await steps(engine, prompt, output))
    assert continued == ids_of(await steps(engine, prompt + output))
    assert continued != ids_of(await steps(engine, prompt))
    assert len(continued) == 16


async def test_the_end_of_sequence_stops_an_answer_unless_it_is_ignored(engine: VllmEngine) -> None:
    answers: dict[bool, list[list[Step]]] = {True: [], False: []}

    async def ask(number: int, ignore_eos: bool) -> None:
        parameters = Parameters(temperature=2.0, seed=number, ignore_eos=ignore_eos)
        got = await steps(
            engine, [number + 9], (), parameters, max_tokens=300, attempt=f"{number}{ignore_eos}"
        )
        answers[ignore_eos].append(got)

    async with anyio.create_task_group() as group:
        for number in range(32):
            group.start_soon(ask, number, True)
            group.start_soon(ask, number, False)
    assert [len(ids_of(got)) for got in answers[True]] == [300] * 32
    stopped = [got for got in answers[False] if got[-1].finish == "stop"]
    assert stopped
    assert all(ids_of(got)[-1] == EOS and EOS not in ids_of(got)[:-1] for got in stopped)


async def test_a_seed_repeats_an_answer(engine: VllmEngine) -> None:
    async def ask(seed: int) -> list[int]:
        return ids_of(
            await steps(engine, [5, 6], (), Parameters(temperature=1.5, seed=seed, ignore_eos=True))
        )

    assert await ask(1) == await ask(1) != await ask(2)


async def test_the_prefix_cache_is_shared_within_a_salt_only(engine: VllmEngine) -> None:
    prompt = [3 + number % 400 for number in range(1500)]
    first = await steps(engine, prompt, salt="one")
    again = await steps(engine, prompt, salt="one")
    other = await steps(engine, prompt, salt="other")
    assert [first[0].cached_tokens, other[0].cached_tokens] == [0, 0]
    assert again[0].cached_tokens > 1000
    assert not any(step.cached_tokens for step in again[1:])


# --- parameters ----------------------------------------------------------------------------------


async def test_every_parameter_reaches_vllm(engine: VllmEngine) -> None:
    values = {
        "temperature": 0.5,
        "top_p": 0.8,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "logprobs": 3,
    }
    callers_own = {"max_tokens", "stop", "raw"}
    the_chats = {"reasoning_effort", "tools", "tool_choice", "tool_name", "parallel_tool_calls", "template"}
    others = callers_own | the_chats | {"response_format", "logit_bias"}
    assert set(Parameters.__struct_fields__) == set(values) | others, "a new one needs a mapping"
    sampling = engine._sampling(msgspec.convert(values | {"logit_bias": {"7": 200}}, Parameters), 40)
    assert {name: getattr(sampling, name) for name in values} == values
    assert sampling.logit_bias == {7: 100.0}
    assert (sampling.max_tokens, sampling.detokenize, sampling.stop) == (40, False, [])


async def test_unset_parameters_have_the_models_defaults(engine: VllmEngine) -> None:
    assert engine._sampling(Parameters(), 4).temperature == 0.7
    assert engine._sampling(Parameters(temperature=0.0), 4).temperature == 0.0
    assert engine._sampling(Parameters(), 4).top_p == 1.0
    assert 0 < engine._sampling(Parameters(top_p=0.0), 4).top_p < 1e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 2.5),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2**70),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("logit_bias", {"100000": 1.0}),
        ("logit_bias", {"-1": 1.0}),
        ("logit_bias", {"9" * 5000: 1.0}),
        ("logit_bias", {"seven": 1.0}),
        ("logit_bias", {"7": float("nan")}),
        ("logit_bias", {str(token_id): 1.0 for token_id in range(1025)}),
    ],
)
async def test_an_error_names_the_value_out_of_range(engine: VllmEngine, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as rejected:
        await steps(engine, [5], (), msgspec.structs.replace(Parameters(), **{name: value}))
    assert (rejected.value.code, rejected.value.param) == ("invalid_value", name)


@pytest.mark.parametrize(
    "parameters",
    [
        Parameters(top_k=2**63 - 1),
        Parameters(seed=2**63 - 1),
        Parameters(seed=-(2**63)),
        Parameters(repetition_penalty=1e308, presence_penalty=-2.0, frequency_penalty=-2.0, top_k=1),
        Parameters(repetition_penalty=1e-308),
        Parameters(top_p=1e-300),
        Parameters(top_p=0.0),
        Parameters(min_p=1.0, temperature=0.01),
    ],
)
async def test_extreme_but_valid_values_do_not_kill_it(engine: VllmEngine, parameters: Parameters) -> None:
    assert ids_of(await steps(engine, [5, 6], [7], parameters, max_tokens=4))
    assert len(ids_of(await steps(engine, [5, 6], max_tokens=4))) == 4


async def test_each_token_has_logprobs_and_the_greedy_one_is_the_likeliest(engine: VllmEngine) -> None:
    got = await steps(engine, [5, 6], [], msgspec.structs.replace(GREEDY, logprobs=20), max_tokens=12)
    logprobs = [logprob for step in got for logprob in step.logprobs]
    assert len(logprobs) == len(ids_of(got)) == 12
    for logprob in logprobs:
        assert len(logprob.top) == 20
        assert (logprob.token, logprob.logprob) == (logprob.top[0].token, logprob.top[0].logprob)
        assert [entry.logprob for entry in logprob.top] == sorted(
            (entry.logprob for entry in logprob.top), reverse=True
        )
        assert 0.0 < sum(math.exp(entry.logprob) for entry in logprob.top) <= 1.0001
    assert [step.logprobs for step in await steps(engine, [5, 6], max_tokens=4)] == [()] * 4


async def test_zero_logprobs_returns_only_the_tokens_own(engine: VllmEngine) -> None:
    got = await steps(engine, [5, 6], [], msgspec.structs.replace(GREEDY, logprobs=0), max_tokens=3)
    assert [(len(step.logprobs), step.logprobs[0].top) for step in got] == [(1, ())] * 3


async def test_a_bias_selects_the_token(engine: VllmEngine) -> None:
    parameters = msgspec.structs.replace(GREEDY, logit_bias={"99": 100})
    assert ids_of(await steps(engine, [5, 6], [], parameters, max_tokens=5)) == [99] * 5


# --- limits --------------------------------------------------------------------------------------


async def test_a_prompt_that_leaves_no_room_is_invalid(engine: VllmEngine) -> None:
    for prompt, output in (([5] * MODEL.context_tokens, []), ([5] * (MODEL.context_tokens - 1), [5])):
        with pytest.raises(InvalidRequest, match="16384 tokens") as rejected:
            await steps(engine, prompt, output)
        assert (rejected.value.code, rejected.value.param) == ("context_length_exceeded", "prompt")


async def test_the_end_of_the_context_ends_an_answer(engine: VllmEngine) -> None:
    got = await steps(engine, [5] * (MODEL.context_tokens - 3), max_tokens=16)
    assert len(ids_of(got)) == 3
    assert got[-1].finish == "length"


async def test_ids_that_the_model_does_not_have_are_invalid(engine: VllmEngine) -> None:
    for prompt in ([], [999_999], [-1]):
        with pytest.raises(InvalidRequest):
            await steps(engine, prompt)


# --- aborts and failures -------------------------------------------------------------------------


async def test_a_request_whose_emit_returns_false_is_aborted(engine: VllmEngine) -> None:
    received: list[Step] = []

    def emit(step: Step) -> bool:
        received.append(step)
        return len(received) < 3

    await engine.generate("unwanted", Rendered([5], GREEDY), [], max_tokens=16_000, salt="a", emit=emit)
    assert len(received) == 3
    await assert_idle(engine)


async def test_an_error_in_emit_ends_only_its_own_request(engine: VllmEngine) -> None:
    others: list[list[Step]] = []

    def emit(step: Step) -> bool:
        raise ZeroDivisionError

    async def other(number: int) -> None:
        others.append(await steps(engine, [number], max_tokens=200, attempt=f"other-{number}"))

    async with anyio.create_task_group() as group:
        group.start_soon(other, 6)
        group.start_soon(other, 7)
        await anyio.sleep(0.02)
        with pytest.raises(ZeroDivisionError):
            await engine.generate("raises", Rendered([5], GREEDY), [], max_tokens=16_000, salt="a", emit=emit)
    assert [len(ids_of(received)) for received in others] == [200, 200]
    await assert_idle(engine)


async def test_cancelling_the_reader_aborts_the_request(engine: VllmEngine) -> None:
    for delay_s in (0.0, 0.0005, 0.002, 0.1):
        with anyio.move_on_after(delay_s) as scope:
            await steps(engine, [5], max_tokens=16_000, attempt=f"cancelled-{delay_s}")
        assert scope.cancelled_caught
    await assert_idle(engine)


async def test_a_failed_start_names_the_cause(tiny: Path) -> None:
    with pytest.raises(EngineFailed, match="no_such_argument"):
        await VllmEngine.start(tiny, MODEL, Profile(args={"no_such_argument": 1}), name="tiny")


async def test_a_start_that_fails_in_the_engine_s_process_names_the_cause(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the environment, which overrides a profile: an earlier engine of this process may have set it there.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")
    with pytest.raises(EngineFailed, match="cannot be started: Available memory on node"):
        await start(tiny)


async def test_a_start_names_a_bound_that_is_below_the_longest_token(tiny: Path) -> None:
    model = msgspec.structs.replace(MODEL, prompt_bytes_per_token_max=15)
    bound = r'models."tiny".prompt_bytes_per_token_max is 15, .* has 16 bytes: set it to 16'
    with pytest.raises(EngineFailed, match=bound):
        await start(tiny, model)


async def test_the_engine_compiles_the_grammars_of_accounts_in_turns(engine: VllmEngine) -> None:
    ended: list[str] = []

    async def ask(account: str, number: int) -> None:
        properties = {f"p{number}_{index}": {"type": "integer"} for index in range(900)}
        schema = json.dumps({"type": "object", "properties": properties})
        response_format = ResponseFormat(type="json_schema", name="x", schema=schema)
        parameters = Parameters(response_format=response_format, ignore_eos=True)
        rendered = await engine.render("x", parameters, raw=True, tokens_max=100)
        attempt = f"{account}-{number}"
        await engine.generate(attempt, rendered, [], max_tokens=1, salt=account, emit=lambda step: True)
        ended.append(account)

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(ask, "a", number)
        tasks.start_soon(ask, "b", 8)
    assert ended.index("b") < 5
    await assert_idle(engine)


# --- prompts -------------------------------------------------------------------------------------

TOOL = Parameters(tools=(Tool(name="f"),), tool_choice="none")


@pytest.mark.parametrize("parameters", [Parameters(), TOOL], ids=["plain", "chat"])
async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_read(
    engine: VllmEngine, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_tokenizer", None)
    monkeypatch.setattr(engine, "_chat", None)
    text = Message(role="user", content="x" * (100 * engine.token_bytes_max + 1))
    for prompt in ((text,), (Message(role="user", content=""),) * 101):
        with pytest.raises(InvalidRequest) as refused:
            await engine.render(prompt, parameters, raw=False, tokens_max=100)
        assert (refused.value.code, refused.value.param) == ("prompt_too_long", "messages")


@pytest.mark.parametrize("text", ["x " * 8192, "x" * 200_000], ids=["counted", "by its characters"])
@pytest.mark.parametrize("parameters", [Parameters(), TOOL], ids=["plain", "chat"])
async def test_a_prompt_of_too_many_tokens_is_refused_with_their_number(
    engine: VllmEngine, parameters: Parameters, text: str
) -> None:
    limit = MODEL.context_tokens - 1
    with pytest.raises(PromptTooLong) as refused:
        await engine.render((Message(role="user", content=text),), parameters, raw=False, tokens_max=limit)
    assert (refused.value.code, refused.value.param) == ("prompt_too_long", "messages")
    assert refused.value.tokens > limit


async def test_a_few_threads_encode_prompts_of_middle_length(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[str] = []
    at_once: list[int] = []

    def encode(prompt: str, **options: Any) -> list[int]:
        running.append(prompt)
        at_once.append(len(running))
        time.sleep(0.05)
        running.pop()
        return [1]

    monkeypatch.setattr(engine._tokenizer, "encode", encode)
    text = "x" * (vllm.ENCODE_INLINE_BYTES + 1)
    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(partial(engine.render, text, Parameters(), raw=True, tokens_max=16_000))
    assert len(at_once) == 8
    assert max(at_once) <= vllm.THREADS


@pytest.mark.parametrize("parameters", [Parameters(), TOOL], ids=["plain", "chat"])
async def test_long_prompts_are_encoded_one_at_a_time_and_short_ones_pass_them(
    engine: VllmEngine, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long ones fit by their bytes: only a tokenizer sees that they have too many tokens."""
    monkeypatch.setattr(vllm, "CERTAIN_BYTES_PER_TOKEN", 100)
    text = "x" * (MODEL.context_tokens - 1000) * 8
    running: list[str] = []
    at_once: list[int] = []
    ends: list[str] = []
    run_long = engine._run_long

    async def watched(check: Callable[[], None], render: Callable[[], Any]) -> Any:
        def counted() -> Any:
            running.append("long")
            at_once.append(len(running))
            try:
                return render()
            finally:
                running.pop()

        return await run_long(check, counted)

    monkeypatch.setattr(engine, "_run_long", watched)

    async def render(name: str, content: str) -> None:
        prompt = (Message(role="user", content=content),)
        try:
            await engine.render(prompt, parameters, raw=False, tokens_max=MODEL.context_tokens - 1)
            ends.append(name)
        except InvalidRequest:
            ends.append(f"{name} refused")

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(render, "long", text)
        tasks.start_soon(render, "short", "hello")
    assert ends == ["short", *["long refused"] * 4]
    assert at_once == [1] * 4


async def test_a_seed_and_a_prompt_of_several_steps_do_not_harm_the_engine(engine: VllmEngine) -> None:
    """vLLM reads a long prompt in steps of `max_num_batched_tokens`: 2,048 here, 256 by the catalogue."""
    prompt = [5 + at % 200 for at in range(5_000)]

    async def answer(seed: int, salt: str) -> list[int]:
        parameters = Parameters(seed=seed, temperature=1.0, ignore_eos=True)
        return ids_of(await steps(engine, prompt, [], parameters, max_tokens=12, salt=salt))

    first = await answer(1, "first")
    again = await answer(1, "again")
    other = await answer(2, "other")
    assert len(first) == 12
    assert first == again
    assert first != other


# --- reasoning -----------------------------------------------------------------------------------
# The model generates noise, except that a bias selects its first token: the end of its reasoning, or none.

QUESTION = (Message(role="user", content="one two"),)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
)


def id_of(token: str, path: Path) -> str:
    added = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    return str(next(entry["id"] for entry in added if entry["content"] == token))


async def ask(engine: VllmEngine, path: Path, *, thinks: bool, **parameters: Any) -> list[Any]:
    bias = {id_of("</think>", path): -100.0 if thinks else 100.0}
    asked = accepted(QUESTION, **{"max_tokens": 60, "seed": 1, "logit_bias": bias, **parameters})
    return await run(engine, asked)


async def test_everything_before_the_end_mark_is_reasoning(engine: VllmEngine, tiny: Path) -> None:
    events = await ask(engine, tiny, thinks=True, ignore_eos=True)
    answer = answer_of(events)
    assert (answer.text, bool(answer.reasoning)) == ("", True)
    assert events[-1].reasoning_tokens == events[-1].output_tokens == 60


async def test_a_grammar_begins_after_the_reasoning(engine: VllmEngine, tiny: Path) -> None:
    response_format = ResponseFormat(type="json_schema", schema=SCHEMA)
    constrained = await ask(engine, tiny, thinks=False, response_format=response_format, max_tokens=400)
    assert json.loads(answer_of(constrained).text)["a"] in (1, 2)
    assert (answer_of(constrained).reasoning, constrained[-1].reasoning_tokens, constrained[-1].reason) == (
        "",
        0,
        "stop",
    )
    thinking = await ask(engine, tiny, thinks=True, response_format=response_format, ignore_eos=True)
    assert answer_of(thinking).text == ""
    assert len(answer_of(thinking).reasoning) > 20


async def test_a_call_follows_reasoning(engine: VllmEngine, tiny: Path) -> None:
    tools = (Tool(name="f", parameters=SCHEMA),)
    events = await ask(
        engine, tiny, thinks=False, tools=tools, tool_choice="function", tool_name="f", max_tokens=400
    )
    (call,) = answer_of(events).tool_calls
    assert json.loads(call.arguments)["a"] in (1, 2)


async def test_another_attempt_continues_the_reasoning(engine: VllmEngine, tiny: Path) -> None:
    bias = {id_of("</think>", tiny): -100.0}
    asked = accepted(QUESTION, max_tokens=40, temperature=0.0, ignore_eos=True, logit_bias=bias)
    begun = tokens_of(await run(engine, asked))[:15]
    rest = await run(engine, asked, past_of(begun))
    answer = answer_of([*begun, *rest])
    assert answer.text == ""
    assert answer.reasoning.startswith(answer_of(begun).reasoning)
    assert rest[-1].reasoning_tokens == rest[-1].output_tokens == 40


# --- the end of the engine -----------------------------------------------------------------------


async def test_a_killed_engine_fails_its_requests_and_leaves_no_process(engine: VllmEngine) -> None:
    children = set(psutil.Process().children(recursive=True))
    (core,) = (child for child in children if "EngineCore" in child.name())

    async def ask() -> None:
        with pytest.raises(EngineFailed):
            await steps(engine, [5], max_tokens=16_000)

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.sleep(0.1)
        os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed):
        await steps(engine, [5])
    await stop(engine)
    await engine.close()
    left = [child for child in children if child.is_running() and "tracker" not in " ".join(child.cmdline())]
    assert left == []
