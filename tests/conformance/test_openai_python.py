"""The official Python SDK, unmodified, against Rift."""

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.scripted import MODEL, End, Pause, Served, Tokens, by_request

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")

pytestmark = pytest.mark.slow

HI: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(api_key=served.key, base_url=f"{served.url}/v1", max_retries=0) as opened:
        yield opened


@pytest.fixture
async def aclient(served: Served) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(api_key=served.key, base_url=f"{served.url}/v1", max_retries=0) as opened:
        yield opened


# --- chat --------------------------------------------------------------------------------------------------


def test_chat(client: Any, served: Served) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in answer.choices] == [
        "Hello, world 🌊! 0",
        "Hello, world 🌊! 1",
    ]
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "Hello0"
    assert answer.usage.total_tokens == 17
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer._request_id == answer.id == served.accepted[0].group
    strictly(answer)


def test_chat_streamed(client: Any) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, stream_options=options
    ) as stream:
        found = list(stream)
    assert found[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)
    assert text == "Hello, world 🌊!"
    assert found[-2].choices[0].finish_reason == "stop"
    assert found[-1].usage.completion_tokens == 5
    for chunk in found:
        strictly(chunk)


def test_the_sdks_own_accumulation_of_a_stream(client: Any) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HI, tools=[WEATHER], tool_choice="required", reasoning_effort="low"
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    assert answer.choices[0].finish_reason == "tool_calls"


def test_tools_round_trip(client: Any) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    first = client.chat.completions.create(
        model=MODEL, messages=HI, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
    )
    message = first.choices[0].message
    assert message.content is None
    answered = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    second = client.chat.completions.create(
        model=MODEL, messages=[*HI, message, answered], tools=[WEATHER], tool_choice="auto"
    )
    assert second.choices[0].message.content == "Hello, world 🌊!"


def test_a_pydantic_model_as_the_answers_format(client: Any, served: Served) -> None:
    class City(pydantic.BaseModel):
        city: str
        people: int

    answer = client.chat.completions.parse(model=MODEL, messages=HI, response_format=City)
    assert answer.choices[0].message.parsed == City(city="Paris", people=2)
    wanted = served.accepted[0].parameters.response_format
    assert wanted is not None
    assert (wanted.name, wanted.strict) == ("City", True)
    assert '"people"' in (wanted.schema or "")


def test_reasoning_has_both_names(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, reasoning_effort="low")
    message = answer.choices[0].message
    assert message.reasoning == message.reasoning_content == "Let me think."
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2


def test_all_sampling_parameters_of_the_sdk_are_accepted(client: Any, served: Served) -> None:
    client.chat.completions.create(
        model=MODEL, messages=HI, temperature=0.1, top_p=0.5, max_completion_tokens=3, stop=["x"], seed=1,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"1": -1}, user="u", metadata={"a": "b"},
        response_format={"type": "json_object"}, service_tier="auto", store=True, verbosity="low",
        prompt_cache_key="k", safety_identifier="s", modalities=["text"],
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True},
    )  # fmt: skip
    accepted = served.accepted[0]
    assert accepted.parameters.max_tokens == 3
    assert (accepted.parameters.top_k, accepted.metadata) == (3, {"a": "b"})


@pytest.mark.anyio
async def test_chat_without_blocking(aclient: Any) -> None:
    answer = await aclient.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == "Hello, world 🌊!"
    stream = await aclient.chat.completions.create(model=MODEL, messages=HI, stream=True)
    text = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(text) == "Hello, world 🌊!"


# --- completions, models -----------------------------------------------------------------------------------


def test_several_prompts(client: Any, served: Served) -> None:
    served.script = lambda accepted: [Tokens(f"{accepted.input}{accepted.choice}"), End()]
    answer = client.completions.create(model=MODEL, prompt=["a", "b", "a"], n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["a0", "a1", "b2", "b3", "a4", "a5"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (21, 6)
    strictly(answer)
    options = {"include_usage": True}
    create = client.completions.create
    *chunks, end = create(model=MODEL, prompt=["a", "b"], stream=True, stream_options=options)
    assert {choice.index: choice.text for chunk in chunks for choice in chunk.choices if choice.text} == {
        0: "a0",
        1: "b1",
    }
    assert (end.choices, end.usage.total_tokens) == ([], 16)
    for prompt in ([], ["a", ""], ["a"] * 9, [1, 2], [[1], [2]]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt=prompt)
        assert caught.value.param.startswith("prompt")


def test_completions(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt="hi", logprobs=1, max_tokens=2)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello,", "length")
    assert answer.choices[0].logprobs.text_offset == [0, 5]
    strictly(answer)
    chunks = list(client.completions.create(model=MODEL, prompt=["hi"], stream=True, n=2))
    for index in (0, 1):
        parts = [each.choices[0].text for each in chunks if each.choices[0].index == index]
        assert "".join(parts) == f"Hello, world 🌊! {index}"


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


# --- errors, retries, timeouts, cancel ---------------------------------------------------------------------


def test_errors_have_their_classes_and_messages(client: Any, served: Served) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model=MODEL, messages=HI, temperature=9)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_value")
    assert wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-9", messages=HI)
    assert unknown.value.code == "model_not_found"
    assert unknown.value.request_id
    with pytest.raises(openai.InternalServerError):
        create(model=MODEL, messages=[{"role": "user", "content": "fail at once"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="rift_wrong").models.list()


def test_a_failure_in_the_middle_of_a_stream_is_raised(client: Any) -> None:
    prompt: Any = [{"role": "user", "content": "fail late"}]
    stream = client.chat.completions.create(model=MODEL, messages=prompt, stream=True)
    assert next(stream).choices[0].delta.content == "some"
    with pytest.raises(openai.APIError, match="the engine failed"):
        next(stream)


def test_server_errors_are_retried_and_refusals_are_not(client: Any, served: Served) -> None:
    tries: list[int] = []

    def script(accepted: Any) -> list[Any]:
        tries.append(1)
        return [Tokens("ok"), End()] if len(tries) == 2 else [End("failed")]

    served.script = script
    answer = client.with_options(max_retries=2).chat.completions.create(model=MODEL, messages=HI)
    assert (answer.choices[0].message.content, len(tries)) == ("ok", 2)
    served.script = lambda accepted: [tries.append(1) or End("poison")]  # type: ignore[func-returns-value]
    tries.clear()
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=2).chat.completions.create(model=MODEL, messages=HI)
    assert len(tries) == 1
    served.script = by_request
    seen: list[httpx.Response] = []
    headers = {"Idempotency-Key": "sdk"}
    client.chat.completions.create(model=MODEL, messages=HI, extra_headers=headers)
    hooks = {"response": [seen.append]}
    with httpx.Client(event_hooks=hooks) as http:
        other = client.with_options(http_client=http, max_retries=2)
        with pytest.raises(openai.UnprocessableEntityError):
            other.chat.completions.create(model=MODEL, messages=HI, n=2, extra_headers=headers)
    assert len(seen) == 1


def test_retry_after_is_honoured(client: Any) -> None:
    """No replica serves the model: 503, retry after 30 s. The SDK would wait that long."""
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="idle", messages=HI)
    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("30", "30000")
    assert client.with_options(max_retries=1)._calculate_retry_timeout(
        1, openai._models.FinalRequestOptions(method="post", url="/"), headers
    ) == pytest.approx(30.0)


def test_a_timeout_cancels_the_request(client: Any, served: Served) -> None:
    served.script = lambda accepted: [Tokens("a"), Pause(10), End()]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model=MODEL, messages=HI)
    wait_for_cancel(served)


def test_a_stream_that_is_closed_cancels_the_request(client: Any, served: Served) -> None:
    served.script = lambda accepted: [Tokens("a"), Pause(10), End()]
    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    next(iter(stream))
    stream.close()
    wait_for_cancel(served)


# --- responses ---------------------------------------------------------------------------------------------


def test_a_response(client: Any, served: Served) -> None:
    answer = client.responses.create(
        model=MODEL, input="hi", instructions="be brief", reasoning={"effort": "low"}, metadata={"a": "b"}
    )
    assert (answer.output_text, answer.status) == ("Hello, world 🌊!", "completed")
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.usage.output_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (7, 2)
    assert [turn.role for turn in served.accepted[0].input] == ["system", "user"]  # type: ignore[union-attr]
    again = client.responses.retrieve(answer.id)
    assert again == answer
    assert answer.metadata == {"a": "b"}
    strictly(answer)


def test_a_response_cut_by_max_tokens_is_incomplete(client: Any) -> None:
    answer = client.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    events = list(client.responses.create(model=MODEL, input="hi", max_output_tokens=2, stream=True))
    assert events[-1].type == "response.incomplete"


def test_the_events_of_a_response(client: Any) -> None:
    events = list(client.responses.create(model=MODEL, input="hi", stream=True, reasoning={"effort": "low"}))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta",
        "output_text.done", "completed",
    ]  # fmt: skip
    for event in events:
        strictly(event)


def test_the_sdks_own_accumulation_of_a_response(client: Any) -> None:
    flat = {"type": "function", **WEATHER["function"]}
    with client.responses.stream(
        model=MODEL, input="hi", tools=[flat], tool_choice="required", reasoning={"effort": "low"}
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds
    call = answer.output[-1]
    assert (call.name, call.arguments) == ("weather", '{"city": "Paris"}')
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    given: Any = [{"role": "user", "content": "hi"}, *answer.output, output]
    second = client.responses.create(model=MODEL, input=given, tools=[flat])
    assert second.output_text == "Hello, world 🌊!"


def test_a_response_parsed_into_a_model(client: Any) -> None:
    class City(pydantic.BaseModel):
        city: str
        people: int

    answer = client.responses.parse(model=MODEL, input="hi", text_format=City)
    assert answer.output_parsed == City(city="Paris", people=2)


def test_a_background_response_is_replayed_from_any_event(client: Any) -> None:
    begun = client.responses.create(model=MODEL, input="hi slowly", background=True, max_output_tokens=30)
    assert (begun.status, begun.background) == ("queued", True)
    events = list(client.responses.retrieve(begun.id, stream=True))
    assert events[-1].response.output_text == "".join(f" {number}" for number in range(30))
    for after in (0, 1, 7, len(events) - 2):
        rest = list(client.responses.retrieve(begun.id, stream=True, starting_after=after))
        assert rest == events[after + 1 :]
    assert client.responses.retrieve(begun.id).status == "incomplete"


def test_a_background_stream_continues_without_its_client(client: Any, served: Served) -> None:
    stream = client.responses.create(
        model=MODEL, input="hi slowly", background=True, stream=True, max_output_tokens=20
    )
    seen = [next(iter(stream)) for _ in range(1)]
    stream.close()
    rest = list(
        client.responses.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number)
    )
    numbers = [event.sequence_number for event in seen + rest]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.incomplete"
    assert not served.cancelled


def test_a_response_that_is_not_stored_can_be_deleted(client: Any) -> None:
    answer = client.responses.create(model=MODEL, input="hi", store=False)
    assert client.responses.retrieve(answer.id) == answer
    client.responses.delete(answer.id)
    with pytest.raises(openai.APIStatusError) as gone:
        client.responses.retrieve(answer.id)
    assert (gone.value.status_code, gone.value.body["code"]) == (410, "content_removed")  # type: ignore[index]


def test_a_response_can_be_cancelled(client: Any) -> None:
    begun = client.responses.create(model=MODEL, input="hi slowly", background=True)
    assert client.responses.cancel(begun.id).status == "cancelled"
    assert client.responses.retrieve(begun.id).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_1")


def test_a_failed_response_has_status_failed(client: Any) -> None:
    events = list(client.responses.create(model=MODEL, input="fail late", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the engine failed"
    assert client.responses.retrieve(events[-1].response.id).status == "failed"


@pytest.mark.anyio
async def test_a_response_without_blocking(aclient: Any) -> None:
    answer = await aclient.responses.create(model=MODEL, input="hi")
    assert answer.output_text == "Hello, world 🌊!"
    async with aclient.responses.stream(model=MODEL, input="hi") as stream:
        assert [event.type async for event in stream][-1] == "response.completed"


def strictly(shown: Any) -> None:
    """Check an object against the SDK's own types, which the SDK itself does not enforce."""
    type(shown).model_validate(shown.model_dump(mode="json", exclude_unset=True), strict=False)


def wait_for_cancel(served: Served) -> None:
    deadline = time.monotonic() + 10
    while not served.cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert served.cancelled[0].why == "disconnect"
