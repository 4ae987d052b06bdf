"""LangChain's chat model for OpenAI, unmodified, against Rift."""

from typing import Any

import httpx
import pytest

from tests.scripted import MODEL, End, Served, Tokens

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="the langchain-openai package is not installed"
)

pytestmark = pytest.mark.slow


@pytest.fixture(params=["chat", "responses"])
def options(served: Served, request: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "api_key": served.key,
        "base_url": f"{served.url}/v1",
        "max_retries": 0,
        "stream_usage": True,
        "use_responses_api": request.param == "responses",
    }


@pytest.fixture
def model(options: dict[str, Any]) -> Any:
    return langchain_openai.ChatOpenAI(**options)


def test_an_answer_and_its_usage(model: Any) -> None:
    answer = model.invoke("hi")
    assert answer.text == "Hello, world 🌊!"
    usage = answer.usage_metadata
    assert (usage["input_tokens"], usage["output_tokens"]) == (7, 5)
    assert usage["input_token_details"]["cache_read"] == 4


def test_a_stream(model: Any) -> None:
    chunks = list(model.stream("hi"))
    assert "".join(chunk.text for chunk in chunks) == "Hello, world 🌊!"
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] == 5


def test_tools(model: Any, served: Served) -> None:
    def weather(city: str) -> str:
        """Tell the weather of a city."""
        return f"rain in {city}"

    bound = model.bind_tools([weather], tool_choice="weather")
    answer = bound.invoke("hi")
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
    told = {"role": "tool", "tool_call_id": call["id"], "content": weather(**call["args"])}
    assert model.invoke([("user", "hi"), answer, told]).text == "Hello, world 🌊!"
    last = served.accepted[-1].input[-1]
    assert not isinstance(last, str)
    assert (last.role, last.content) == ("tool", "rain in Paris")


def test_an_answer_in_a_schema(model: Any) -> None:
    schema = {
        "title": "city",
        "type": "object",
        "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    found = model.with_structured_output(schema, method="json_schema").invoke("hi")
    assert found == {"city": "Paris", "people": 2}


def test_several_prompts_in_one_request(served: Served) -> None:
    served.script = lambda accepted: [Tokens(f"{accepted.input}{accepted.choice}"), End()]
    model = langchain_openai.OpenAI(
        model=MODEL, api_key=served.key, base_url=f"{served.url}/v1", max_retries=0, batch_size=8
    )
    result = model.generate(["a", "b", "a"])
    assert [[one.text for one in found] for found in result.generations] == [["a0"], ["b1"], ["a2"]]
    assert result.llm_output["token_usage"]["prompt_tokens"] == 21
    assert len({accepted.request for accepted in served.accepted}) == 3
    # Ten prompts are two requests.
    assert model.batch([str(number) for number in range(10)]) == [
        *(f"{number}{number}" for number in range(8)), "80", "91"
    ]  # fmt: skip
    two = langchain_openai.OpenAI(
        model=MODEL, api_key=served.key, base_url=f"{served.url}/v1", max_retries=0, n=2, best_of=2
    )
    found = two.generate(["a", "b"]).generations
    assert [[one.text for one in each] for each in found] == [["a0", "a1"], ["b2", "b3"]]


@pytest.mark.anyio
async def test_without_blocking(options: dict[str, Any]) -> None:
    # LangChain caches its own client, together with the event loop of an earlier test.
    async with httpx.AsyncClient() as client:
        model = langchain_openai.ChatOpenAI(http_async_client=client, **options)
        assert (await model.ainvoke("hi")).text == "Hello, world 🌊!"
        assert "".join([chunk.text async for chunk in model.astream("hi")]) == "Hello, world 🌊!"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_a_context_overflow(model: Any, stream: bool) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError, match="context_length_exceeded"):
        list(model.stream("too long")) if stream else model.invoke("too long")
